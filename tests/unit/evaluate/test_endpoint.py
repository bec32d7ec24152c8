"""The endpoint judge against a server here: verdicts, tries, time limits, nonsense, budget, the key."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rose_ray.config.judge import JudgeConfig
from rose_ray.data.conversation import Message
from rose_ray.distributed.judging import JudgingTask, ask_endpoint
from rose_ray.errors import ConfigError, JudgeError, TokenBudgetError
from rose_ray.evaluate.endpoint import EndpointJudge, parse_verdict
from rose_ray.evaluate.judges import Comparison, judge_identity
from rose_ray.evaluate.judging import read_verdicts, verdict_folder
from rose_ray.stores.manifest import commit_artefact
from rose_ray.stores.workspace import Workspace
from tests.unit.evaluate.test_judging import pairs

COMPARISON = Comparison((Message("user", "Why is the sky blue?"),), "Air scatters light.", "It is.")
KEY = "sk-very-secret"


class Server:
    """Answers by a script and keeps what it was sent."""

    def __init__(self) -> None:
        self.replies: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((body, dict(self.headers)))
                outer.path = self.path
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                reply(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.path = ""
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def says(text: str, tokens: int | None = 10) -> Callable[[BaseHTTPRequestHandler], None]:
    content: dict[str, Any] = {"choices": [{"message": {"content": text}}]}
    if tokens is not None:
        content["usage"] = {"total_tokens": tokens}
    return sends(200, json.dumps(content))


def sends(status: int, text: str, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())

    return reply


def judge(server: Server, spent: int = 0, **settings: Any) -> EndpointJudge:
    own = {"retries": 2, "timeout_seconds": 5.0, "backoff_seconds": 0.0, "max_reply_tokens": 20, **settings}
    return EndpointJudge(JudgeConfig(name="gpt", kind="endpoint", url=server.url, model="big", **own), spent)


def test_a_verdict(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.replies = [says("A explains it.\nVerdict: A"), says("Verdict: **B**"), says("tie")]
    asked = judge(server, api_key_env="JUDGE_KEY")
    assert [asked.rule(COMPARISON).preference for _ in range(3)] == ["first", "second", "tie"]
    body, headers = server.requests[0]
    assert server.path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "big" and body["temperature"] == 0 and body["max_tokens"] == 20
    text = body["messages"][0]["content"]
    assert text.index("User: Why is the sky blue?") < text.index("Air scatters light.") < text.index("It is.")
    assert asked.spent == 30


@pytest.mark.parametrize(
    ("reply", "preference"),
    [
        ("Verdict: A", "first"),
        ("verdict - none. Verdict: B.", "second"),
        ("Verdict: A at first, but on reflection\nVerdict: tie", "tie"),
        ("B", "second"),
        ("(A).", "first"),
        ("Verdict: Apples", None),
        ("Answer A is good", None),
        ("", None),
    ],
)
def test_what_counts_as_a_verdict(reply: str, preference: str | None) -> None:
    assert parse_verdict(reply) == preference


def test_nonsense_is_asked_again_and_then_no_verdict(server: Server) -> None:
    server.replies = [says("I like turtles."), says("Verdict: B")]
    assert judge(server).rule(COMPARISON).preference == "second"
    server.replies = [says("I like turtles.")]
    ruling = judge(server).rule(COMPARISON)
    assert ruling.preference is None and "I like turtles." in ruling.detail
    assert len(server.requests) == 2 + 3


def test_replies_that_are_no_chat_completion(server: Server) -> None:
    for reply, what in ((sends(200, "<html>"), "not JSON: '<html>'"), (sends(200, "{}"), "no text at choices")):
        server.replies = [reply]
        with pytest.raises(JudgeError, match=rf"gave no reply in 3 tries of 5 s: .*{what}"):
            judge(server).rule(COMPARISON)


def test_a_judge_that_times_out(server: Server) -> None:
    server.replies = [lambda handler: time.sleep(0.5)]
    slow = judge(server, timeout_seconds=0.1, retries=1)
    with pytest.raises(JudgeError, match=r"judge gpt: http.* gave no reply in 2 tries of 0.1 s: .*timed out"):
        slow.rule(COMPARISON)
    assert slow.spent > 40  # both may have been paid for


@pytest.mark.parametrize("begun", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 503 Busy\r\n\r\n"])
def test_a_judge_that_drips_times_out(server: Server, begun: bytes) -> None:
    ended = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(begun)
        while not ended.wait(0.05):  # far below the time limit
            handler.wfile.write(b"1")

    server.replies = [drip]
    slow, started = judge(server, timeout_seconds=0.5, retries=1), time.monotonic()
    try:
        with pytest.raises(JudgeError, match=r"gave no reply in 2 tries of 0.5 s: TimeoutError: timed out before the"):
            slow.rule(COMPARISON)
    finally:
        ended.set()
    assert time.monotonic() - started < 20  # a loaded machine; without the limit it would not end
    assert slow.spent > 40  # both may have been paid for


def test_parameters_of_the_request_can_be_changed(server: Server) -> None:
    server.replies = [says("Verdict: A", tokens=None)]
    extra = {"max_tokens": None, "temperature": None, "max_completion_tokens": 300, "reasoning": {"effort": "low"}}
    asked = judge(server, extra_body=extra)
    asked.rule(COMPARISON)
    body, _ = server.requests[0]
    assert body.pop("messages") and body == {
        "model": "big",
        "max_completion_tokens": 300,
        "reasoning": {"effort": "low"},
    }
    assert asked.spent > 300  # what the budget reckons with is the longer of the limits
    identities = [judge_identity(judge(server, **own).config) for own in ({}, {"extra_body": extra})]
    assert identities[1] == {**identities[0], "extra_body": extra} and "extra_body" not in identities[0]


def test_a_refused_parameter_leads_to_the_key_that_changes_it(server: Server) -> None:
    server.replies = [sends(400, "Unsupported parameter: 'max_tokens'")]
    with pytest.raises(
        JudgeError, match=r"in 1 tries .*'max_tokens'\. The request set max_tokens, temperature: `extra"
    ):
        judge(server).rule(COMPARISON)


def test_errors_that_pass_are_tried_again(server: Server) -> None:
    waits: list[float] = []
    server.replies = [sends(429, "slow down"), sends(503, "busy"), says("Verdict: A")]
    config = JudgeConfig(name="gpt", kind="endpoint", url=server.url, model="big", backoff_seconds=2.0)
    assert EndpointJudge(config, sleep=waits.append).rule(COMPARISON).preference == "first"
    assert waits == [2.0, 4.0]


def test_errors_that_stay_are_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.replies = [sends(401, f"wrong key {KEY}")]
    with pytest.raises(JudgeError, match="in 1 tries") as caught:
        judge(server, api_key_env="JUDGE_KEY").rule(COMPARISON)
    assert "HTTP 401: wrong key ***" in str(caught.value) and KEY not in str(caught.value)
    assert len(server.requests) == 1


def sends_raw(data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return reply


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "BadStatusLine"),
        (b"", "RemoteDisconnected"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
        (b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "more than 100 headers"),
    ],
)
def test_what_is_no_http_is_tried_again(server: Server, data: bytes, what: str) -> None:
    server.replies = [sends_raw(data), says("Verdict: A")]
    assert judge(server).rule(COMPARISON).preference == "first"
    server.replies = [sends_raw(data)]
    with pytest.raises(JudgeError, match=f"gave no reply in 3 tries of 5 s: .*{what}"):
        judge(server).rule(COMPARISON)


@pytest.mark.parametrize("key", ["sk-very\n", "sk very", "sk-vér", "\tsk-very"])
def test_a_key_that_fits_no_header(server: Server, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match="JUDGE_KEY holds white space") as caught:
        judge(server, api_key_env="JUDGE_KEY")
    assert key.strip() not in str(caught.value)


def test_a_redirect_does_not_carry_the_key_away(server: Server) -> None:
    server.replies = [sends(302, "", Location=f"{server.url}/elsewhere")]
    with pytest.raises(JudgeError, match="HTTP 302"):
        judge(server).rule(COMPARISON)
    assert len(server.requests) == 1


def test_a_key_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY is not set"):
        judge(server, api_key_env="JUDGE_KEY")


def test_the_budget_stops_before_it_is_overrun(server: Server) -> None:
    server.replies = [says("Verdict: A", tokens=200)]
    asked = judge(server, spent=500, token_budget=1300)
    for _ in range(2):
        asked.rule(COMPARISON)
    with pytest.raises(TokenBudgetError, match=r"judge gpt: 900 of 1,300 tokens are spent and the next request may"):
        judge(server, spent=900, token_budget=1300, max_reply_tokens=400).rule(COMPARISON)
    assert asked.spent == 900 and len(server.requests) == 2


def test_a_reply_without_its_cost_counts_as_estimated(server: Server) -> None:
    server.replies = [says("Verdict: A", tokens=None)]
    asked = judge(server)
    asked.rule(COMPARISON)
    bytes_sent = len(server.requests[0][0]["messages"][0]["content"].encode())
    assert asked.spent == -(-bytes_sent // 3) + 20


def test_threads_share_the_budget(server: Server) -> None:
    server.replies = [says("Verdict: A", tokens=200)]  # the estimate is a little above
    asked = judge(server, token_budget=1000)
    stopped = []

    def ask() -> None:
        try:
            asked.rule(COMPARISON)
        except TokenBudgetError:
            stopped.append(1)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stopped and asked.spent <= 1000


@pytest.fixture
def judging(tmp_path: Path) -> tuple[Workspace, JudgingTask]:
    """A workspace with answers of two models to three prompts."""
    workspace = Workspace.open(str(tmp_path), create=True)
    for name, answer in (("ours", "one"), ("theirs", "two")):
        text = "".join(json.dumps({"item_id": f"p{i}", "answer": answer}) + "\n" for i in range(3))
        record = workspace.write(f"{name}/items.jsonl", text.encode())
        commit_artefact(workspace, name, {"name": name}, [record], {}, {}, started=0.0, folder=name)
    return workspace, JudgingTask("h", "ours", "theirs", *verdict_folder({"kind": "endpoint"}, "ours", "theirs"))


def counting(server: Server, **settings: Any) -> JudgeConfig:
    own = {"parallel": 1, "token_budget": 750, "max_reply_tokens": 20, **settings}
    return JudgeConfig(name="gpt", kind="endpoint", url=server.url, model="big", **own)


def test_the_count_of_tokens_is_kept(server: Server, judging: tuple[Workspace, JudgingTask]) -> None:
    workspace, task = judging
    server.replies = [says("Verdict: A", tokens=200)]
    with pytest.raises(TokenBudgetError):
        ask_endpoint(workspace, counting(server), {"h": pairs(3)}, [task])
    ledger = "evaluation/judges/gpt.json"
    assert workspace.read_json(ledger) == {"judge": "gpt", "tokens": 600}
    ask_endpoint(workspace, counting(server, token_budget=5000), {"h": pairs(3)}, [task])
    assert workspace.read_json(ledger)["tokens"] == 600 + 4 * 200  # the comparison it stopped in is asked anew
    assert [v["score"] for v in read_verdicts(workspace, task.folder)] == [0.5, 0.5, 0.5]


def test_the_count_holds_for_the_judges_name(server: Server, judging: tuple[Workspace, JudgingTask]) -> None:
    workspace, task = judging
    server.replies = [says("Verdict: A", tokens=200)]
    with pytest.raises(TokenBudgetError):
        ask_endpoint(workspace, counting(server), {"h": pairs(3)}, [task])
    other = counting(server, max_reply_tokens=30).model_copy(update={"url": server.url + "/"})
    other_task = replace(task, folder="evaluation/verdicts/other")
    with pytest.raises(TokenBudgetError, match="600 of 750 tokens are spent"):
        ask_endpoint(workspace, other, {"h": pairs(3)}, [other_task])


def test_the_count_is_kept_while_it_grows(server: Server, judging: tuple[Workspace, JudgingTask]) -> None:
    workspace, task = judging
    counts = []

    def reply(handler: BaseHTTPRequestHandler) -> None:
        kept = workspace.exists("evaluation/judges/gpt.json")
        counts.append(workspace.read_json("evaluation/judges/gpt.json")["tokens"] if kept else 0)
        says("Verdict: A", tokens=200)(handler)

    server.replies = [reply]
    ask_endpoint(workspace, counting(server, token_budget=5000), {"h": pairs(3)}, [task])
    assert counts == [0, 0, 400, 400, 800, 800]  # what a process killed at that moment would have left
