"""A judge behind an OpenAI-compatible endpoint: one request an order, within a budget of tokens.

The key is read from the environment when the judge starts, and stands in no message, file or log.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from rose_ray.config.judge import JudgeConfig
from rose_ray.errors import ConfigError, JudgeError, TokenBudgetError
from rose_ray.evaluate.judges import Comparison, Ruling

logger = logging.getLogger(__name__)

INSTRUCTION = (
    "Think it over in a sentence or two. End with a line of its own: Verdict: A, or Verdict: B, or Verdict: tie."
)

_VERDICT = re.compile(r"verdict\s*[:=]?\s*[*\"'(\[]*\s*(A|B|tie)\b", re.IGNORECASE)
_BARE = re.compile(r"\W*(A|B|tie)\W*", re.IGNORECASE)
_HEADER = re.compile(r"[!-~]+")
_BYTES_PER_TOKEN = 3
"""Below what tokenizers reach on prose, so that an estimate is rather too high."""

_REPLY_LIMITS = ("max_tokens", "max_completion_tokens")
"""Parameters of a request that bound what a reply costs."""

_MAX_REPLY_BYTES = 1 << 20
_SHOWN = 200


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: the status comes back as an error."""


class _Refused(Exception):
    """A reply that another try may mend, or not.

    Attributes:
        lasting: Another try would end alike.
    """

    def __init__(self, text: str, *, lasting: bool) -> None:
        super().__init__(text)
        self.lasting = lasting


def endpoint_key(config: JudgeConfig) -> str:
    """Return the key of an endpoint from the environment; empty where it needs none.

    Raises:
        ConfigError: The variable is not set, or holds what no header can.
    """
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "")
    where = f"judge {config.name}: the environment variable {config.api_key_env}"
    if not key:
        raise ConfigError(
            f"{where} is not set. It has to hold the endpoint's key where `rose-ray evaluate` is started."
        )
    if not _HEADER.fullmatch(key):
        raise ConfigError(
            f"{where} holds white space, a line end or a character beyond ASCII. Set it to the key alone."
        )
    return key


class EndpointJudge:
    """Asks an endpoint, one request a comparison. Safe to call from several threads.

    Args:
        config: Endpoint, time limit, tries, budget.
        spent: Tokens spent before, in this workspace.
        sleep: Waits; tests put in another.

    Raises:
        ConfigError: As `endpoint_key`.
    """

    def __init__(self, config: JudgeConfig, spent: int = 0, sleep: Callable[[float], None] = time.sleep) -> None:
        assert config.url is not None
        self.config, self._sleep = config, sleep
        self.url = config.url.rstrip("/") + "/chat/completions"
        self._key = endpoint_key(config)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._spent, self._reserved = spent, 0

    @property
    def spent(self) -> int:
        """Tokens spent, those before included; requests that broke off count with their estimate."""
        with self._lock:
            return self._spent

    def rule(self, comparison: Comparison) -> Ruling:
        """Judge one comparison in the order given.

        Raises:
            TokenBudgetError: The request might go beyond the budget; it was not sent.
            JudgeError: The endpoint gives no reply, whatever it says.
        """
        text = comparison.question + INSTRUCTION
        failure = ""
        for attempt in range(self.config.retries + 1):
            if attempt:
                self._sleep(self.config.backoff_seconds * 2 ** (attempt - 1))
            try:
                reply = self._paid(text)
            except _Refused as error:
                failure = str(error)
                if error.lasting:
                    break
                continue
            verdict = parse_verdict(reply)
            if verdict is not None:
                return Ruling(verdict)
            failure = ""
            detail = f"no verdict in {self._shown(reply)!r}"
        if failure:
            raise JudgeError(
                f"judge {self.config.name}: {self.url} gave no reply in {attempt + 1} tries of "
                f"{self.config.timeout_seconds:g} s: {failure}. What was judged is kept; run again once it answers."
            )
        return Ruling(None, detail)

    def _paid(self, text: str) -> str:
        """Send one request and count its tokens."""
        config = self.config
        estimate = math.ceil(len(text.encode()) / _BYTES_PER_TOKEN) + self._longest_reply()
        with self._lock:
            taken = self._spent + self._reserved
            if config.token_budget is not None and taken + estimate > config.token_budget:
                raise TokenBudgetError(
                    f"judge {config.name}: {self._spent:,} of {config.token_budget:,} tokens are spent and the next "
                    f"request may take {estimate:,}. What was judged is kept; raise `token_budget` and run again."
                )
            self._reserved += estimate
        used = estimate  # of a request that breaks off nobody says what it cost
        try:
            reply = self._send(text)
            used = _usage(reply, estimate)
            return _content(reply)
        except _Refused as error:
            used = 0 if error.lasting else used
            raise
        finally:
            with self._lock:
                self._reserved -= estimate
                self._spent += used

    def _longest_reply(self) -> int:
        limits = [self.config.extra_body.get(name) for name in _REPLY_LIMITS]
        return max([self.config.max_reply_tokens, *(limit for limit in limits if isinstance(limit, int))])

    def _send(self, text: str) -> Any:
        parameters = {"temperature": 0, "max_tokens": self.config.max_reply_tokens, **self.config.extra_body}
        parameters = {name: value for name, value in parameters.items() if value is not None}
        body = {"model": self.config.model, "messages": [{"role": "user", "content": text}], **parameters}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        try:
            status, content = self._exchange(request)
        except (OSError, http.client.HTTPException) as error:  # time is up, no such host, a reply that is no HTTP
            raise _Refused(self._shown(f"{type(error).__name__}: {error}"), lasting=False) from None
        if status is not None:
            lasting = status < 500 and status not in (408, 409, 425, 429)
            advice = (
                f". The request set {', '.join(sorted(parameters)) or 'no parameter'}: `extra_body` adds parameters, "
                "changes them, and removes those that it sets to null"
            )
            told = f"HTTP {status}: {self._shown(content.decode(errors='replace'))}{advice if status == 400 else ''}"
            raise _Refused(told, lasting=lasting)
        try:
            return json.loads(content)
        except ValueError:
            raise _Refused(f"not JSON: {self._shown(content.decode(errors='replace'))!r}", lasting=False) from None

    def _exchange(self, request: urllib.request.Request) -> tuple[int | None, bytes]:
        """Return the status, None where all is well, and what came back, whole and in time."""
        reply: Future[tuple[int | None, bytes]] = Future()

        def ask() -> None:
            try:
                reply.set_result(self._asked(request))
            except BaseException as error:
                reply.set_exception(error)

        # The time limit of a socket is for each piece: a server that sends a byte now and then would be waited for
        # without end. Such a connection is left to its thread, which ends with it, or with this process.
        threading.Thread(target=ask, daemon=True).start()
        if not wait([reply], self.config.timeout_seconds).done:
            raise TimeoutError("timed out before the reply was there whole")
        return reply.result()

    def _asked(self, request: urllib.request.Request) -> tuple[int | None, bytes]:
        try:
            with self._opener.open(request, timeout=self.config.timeout_seconds) as response:
                return None, response.read(_MAX_REPLY_BYTES)
        except urllib.error.HTTPError as error:
            return error.code, error.read(_MAX_REPLY_BYTES)

    def _shown(self, text: str) -> str:
        """A piece of what came back, without the key that some servers repeat."""
        hidden = text.replace(self._key, "***") if self._key else text
        return hidden[:_SHOWN]


def parse_verdict(reply: str) -> Any:
    """Return the preference that a reply states last, or None: ``Verdict: A``, or nothing but the letter."""
    stated = _VERDICT.findall(reply)
    bare = _BARE.fullmatch(reply.strip())
    label = stated[-1] if stated else bare.group(1) if bare else ""
    return {"a": "first", "b": "second", "tie": "tie"}.get(label.lower())


def _content(reply: Any) -> str:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise _Refused("its reply has no text at choices[0].message.content", lasting=False)
    return content


def _usage(reply: Any, estimate: int) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) and total >= 0 else estimate
