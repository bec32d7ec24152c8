"""Judging: both orders, what is kept, where it stops; judges that need a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rose_ray.config.judge import JudgeConfig
from rose_ray.data.conversation import Message
from rose_ray.data.preferences import PreferencePair
from rose_ray.errors import AccountingError, JudgeError, ModelError, RowError
from rose_ray.evaluate.judges import Comparison, LocalJudge, RewardModel, Ruling, ScoreJudge, load_judge, preference_of
from rose_ray.evaluate.judging import judge_answers, judge_numbers, judge_pair, read_verdicts, verdict_folder
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stores.manifest import find_manifest
from rose_ray.stores.workspace import Workspace
from tests.tiny import as_pickle, byte_level_tokenizer, tiny_config

CONFIG = JudgeConfig(name="j", kind="endpoint", url="http://h/v1", model="m", parallel=2, max_unusable=0.25)


def pairs(count: int) -> list[PreferencePair]:
    prompt = (Message("user", "Why?"),)
    return [PreferencePair(f"p{i}", "s", prompt, "good", "bad", "Why?", "good", "bad") for i in range(count)]


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"item_id": f"p{i}", "answer": text} for i, text in enumerate(texts)]


class Scripted:
    """Prefers by a rule, keeps what it was asked, and fails when told to."""

    def __init__(self, rule: Any, fail_after: int | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self._rule, self._fail_after = rule, fail_after

    def rule(self, comparison: Comparison) -> Ruling:
        if self._fail_after is not None and len(self.asked) >= self._fail_after:
            raise JudgeError("judge j: stopped")
        self.asked.append((comparison.first, comparison.second))
        return Ruling(self._rule(comparison))


def longer(comparison: Comparison) -> Any:
    return preference_of(len(comparison.first) - len(comparison.second), 0)


def test_both_orders_are_asked() -> None:
    judge = Scripted(longer)
    found = judge_pair(judge, pairs(1)[0], {"answer": "long one"}, {"answer": "short"})
    assert judge.asked == [("long one", "short"), ("short", "long one")]
    assert (found["ours_first"], found["ours_second"], found["score"]) == ("first", "second", 1.0)
    assert found["length_difference"] == 3
    first = judge_pair(Scripted(lambda c: "first"), pairs(1)[0], {"answer": "a"}, {"answer": "b"})
    assert first["score"] == 0.5
    same = Scripted(longer)
    assert judge_pair(same, pairs(1)[0], {"answer": "a"}, {"answer": "a"})["score"] == 0.5 and same.asked == []


def run(workspace: Workspace, judge: Any, count: int = 5, config: JudgeConfig = CONFIG) -> str:
    ours = answers(*(["longer", "x"] * count)[:count])
    folder, made_from = verdict_folder({"kind": "test"}, "ours", "theirs")
    theirs = answers(*["four"] * count)
    return judge_answers(workspace, config, judge, pairs(count), ours, theirs, folder, made_from)


def test_a_judging_that_stopped_goes_on(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    config = CONFIG.model_copy(update={"parallel": 1})
    broken = Scripted(longer, fail_after=5)
    with pytest.raises(JudgeError, match="stopped"):
        run(workspace, broken, config=config)
    folder, _ = verdict_folder({"kind": "test"}, "ours", "theirs")
    assert find_manifest(workspace, folder) is None
    going_on = Scripted(longer)
    run(workspace, going_on, config=config)
    assert len(going_on.asked) == 6  # two comparisons of five were finished, the third was half asked
    verdicts = read_verdicts(workspace, folder)
    assert [v["score"] for v in verdicts] == [1.0, 0.0, 1.0, 0.0, 1.0]
    done = Scripted(longer)
    assert run(workspace, done, config=config) == folder and done.asked == []
    whole = Workspace.open(str(tmp_path / "other"), create=True)
    run(whole, Scripted(longer))
    assert read_verdicts(whole, folder) == verdicts


def test_what_a_batch_finished_is_kept_when_one_of_it_fails(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)

    def rule(comparison: Comparison) -> Any:
        if "x" in (comparison.first, comparison.second):
            raise JudgeError("judge j: no")
        return longer(comparison)

    with pytest.raises(JudgeError, match="no"):
        run(workspace, Scripted(rule))
    folder, _ = verdict_folder({"kind": "test"}, "ours", "theirs")
    kept = [json.loads(line) for line in workspace.read(f"{folder}/part-00000.jsonl").decode().splitlines()]
    assert [each["item_id"] for each in kept] == ["p0"]


def test_too_many_without_a_verdict_stop_it(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    with pytest.raises(JudgeError, match=r"2 of 2 comparisons so far have no verdict, above max_unusable 0.25 of 5"):
        run(workspace, Scripted(lambda c: None))
    tolerant = CONFIG.model_copy(update={"max_unusable": 1.0})
    folder = run(workspace, Scripted(lambda c: None), config=tolerant)
    assert [v["score"] for v in read_verdicts(workspace, folder)] == [None] * 5


def test_nonsense_is_never_taken_for_judged(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    for _ in range(5):
        with pytest.raises(JudgeError, match="have no verdict, above max_unusable"):
            run(workspace, Scripted(lambda c: None))
    folder, _ = verdict_folder({"kind": "test"}, "ours", "theirs")
    assert find_manifest(workspace, folder) is None


def test_a_judge_that_is_mended_goes_on_at_once(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    with pytest.raises(JudgeError, match="have no verdict"):
        run(workspace, Scripted(lambda c: None if len(c.first + c.second) == len("longerfour") else longer(c)))
    mended = Scripted(longer)
    folder = run(workspace, mended)
    assert [v["score"] for v in read_verdicts(workspace, folder)] == [1.0, 0.0, 1.0, 0.0, 1.0]
    manifest = find_manifest(workspace, folder)
    assert manifest is not None and manifest.counts == {"items": 5, "unusable": 0}
    assert len(mended.asked) < 2 * 5  # what has a verdict is not asked again


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    with pytest.raises(AccountingError):
        judge_answers(workspace, CONFIG, Scripted(longer), pairs(1), answers("a"), answers("a", "b"), "f", {})


def test_cross_entropy_lower_wins(tmp_path: Path) -> None:
    workspace = Workspace.open(str(tmp_path), create=True)
    config = JudgeConfig(name="c", kind="cross_entropy", tie_margin=0.5)

    def items(*logps: float) -> list[dict[str, Any]]:
        return [{"item_id": f"p{i}", "logp_chosen": logp, "tokens_chosen": 2} for i, logp in enumerate(logps)]

    folder, made_from = verdict_folder({"kind": "cross_entropy"}, "a", "b")
    judge_numbers(workspace, config, items(-1, -5, -3), items(-4, -1, -4), folder, made_from)
    # per token: +1.5, -2, +0.5, the last within the margin
    assert [v["score"] for v in read_verdicts(workspace, folder)] == [1.0, 0.0, 0.5]


def test_scores_decide() -> None:
    judge = ScoreJudge(lambda prompt, answer, reference: float(len(answer)), tie_margin=1.0)
    compared = [judge.rule(Comparison((), first, "bbb")) for first in ("aaaaa", "aaaa", "a")]
    assert [ruling.preference for ruling in compared] == ["first", "tie", "second"]
    overlap = load_judge(JudgeConfig(name="r", kind="rouge_l"))
    assert overlap.rule(Comparison((), "nothing", "the cat", "a cat")).preference == "second"

    def fails(prompt: Any, answer: str, reference: str) -> float:
        raise RowError("prompt_too_long", "no room")

    assert ScoreJudge(fails, 0.0).rule(Comparison((), "a", "b")) == Ruling(None, "prompt_too_long: no room")


def test_a_local_model_prefers_the_likelier_letter(base_folder: str) -> None:
    config = JudgeConfig(name="l", kind="local_model", model=base_folder)
    judge = LocalJudge(config)
    comparison = Comparison((Message("user", "Why?"),), "one", "two")
    prompt = [Message("user", comparison.question + "Reply with one letter, A or B.")]
    logps = []
    for letter in "AB":
        sample = judge.tokeniser.encode_answer(prompt, letter)
        ids = torch.tensor([sample.input_ids])
        with torch.no_grad():
            table = judge.model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = [i for i, counts in enumerate(sample.loss_mask) if counts]
        logps.append(sum(float(table[i - 1, ids[0, i]]) for i in places))
    assert judge.rule(comparison).preference == ("first" if logps[0] > logps[1] else "second")
    wide = LocalJudge(config.model_copy(update={"tie_margin": 1e6}))
    assert wide.rule(comparison).preference == "tie"


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward")
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(tiny_config("llama", len(tokenizer), num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_model_scores_prompt_and_answer(reward_folder: str) -> None:
    config = JudgeConfig(name="r", kind="reward_model", model=reward_folder)
    model = RewardModel(config)
    prompt = (Message("user", "Why?"),)
    ids = load_tokeniser_ids(reward_folder, prompt, "because")
    with torch.no_grad():
        slow = float(model.model.score(model.model.model(input_ids=ids).last_hidden_state)[0, -1, 0])
    # the same float32 operations on the last place
    assert model.score(prompt, "because", "") == pytest.approx(slow, abs=1e-6)
    scores = [model.score(prompt, text, "") for text in ("because", "no")]
    ruling = load_judge(config).rule(Comparison(prompt, "because", "no"))
    assert ruling.preference == ("first" if scores[0] > scores[1] else "second")


def load_tokeniser_ids(folder: str, prompt: tuple[Message, ...], answer: str) -> torch.Tensor:
    from rose_ray.config.model import ModelConfig

    return torch.tensor([load_tokeniser(ModelConfig(base=folder)).encode_answer(prompt, answer).input_ids])


def test_a_reward_model_is_not_read_from_a_pickle(reward_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reward_folder, tmp_path / "reward"))
    as_pickle(folder)
    with pytest.raises(ModelError, match=r"judge r: cannot load .* as a reward model: .*model\.safetensors"):
        load_judge(JudgeConfig(name="r", kind="reward_model", model=str(folder)))


def test_a_language_model_is_no_reward_model(base_folder: str) -> None:
    with pytest.raises(ModelError, match=r"judge r: .* is no reward model"):
        load_judge(JudgeConfig(name="r", kind="reward_model", model=base_folder))
