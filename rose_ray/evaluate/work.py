"""One model's work: train it or find it, and measure it on every benchmark that lacks its numbers.

Models lie at ``evaluation/models/KEY`` (a PEFT adapter), numbers at ``evaluation/measures/KEY/items.jsonl``, each with
a manifest, so what is there is not done again. Where the work runs is not said here.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.data.conversation import parse_conversation
from rose_ray.data.preferences import PreferencePair
from rose_ray.data.tokenize import Sample, Tokeniser
from rose_ray.errors import AccountingError, RowError
from rose_ray.evaluate.benchmarks import Benchmark
from rose_ray.evaluate.fine_tune import fresh_model, set_adapter, train_on_pairs, train_on_rows
from rose_ray.evaluate.generate import GENERATE_VERSION
from rose_ray.evaluate.measures import MEASURE_VERSION, Item, measure
from rose_ray.evaluate.trials import MODELS_FOLDER, Training, row_set_digest
from rose_ray.model.checkpoint import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from rose_ray.model.tokenizer import load_tokeniser
from rose_ray.stages.pool import read_pool_entry, skipped_rows
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest, read_manifest
from rose_ray.stores.workspace import FileRecord, Workspace

if TYPE_CHECKING:
    from peft import PeftModel

ROWS_FOLDER = "evaluation/rows"
MEASURES_FOLDER = "evaluation/measures"
ITEMS_FILE = "items.jsonl"
_ROWS_FILE = "rows.txt"


@dataclass(frozen=True)
class Workbench:
    """What all models of an evaluation share; travels to workers by pickle.

    Attributes:
        workspace: Where everything is.
        pool: Holds the rows.
        evaluation: Settings.
        model, lora: Of the model that is fine-tuned.
        pairs: Of every target, for the controls.
        benchmarks: What every model is measured on.
        device: ``cpu`` or ``cuda``.
        threads: Torch threads; fixed, since they decide the last bits.
    """

    workspace: Workspace
    pool: Manifest
    evaluation: EvaluationConfig
    model: ModelConfig
    lora: LoraConfig
    pairs: Mapping[str, Sequence[PreferencePair]]
    benchmarks: Sequence[Benchmark]
    device: str = "cpu"
    threads: int = 1


def store_rows(workspace: Workspace, row_ids: Sequence[str]) -> Manifest:
    """Keep a set of row ids under its digest, and return its artefact."""
    started = time.monotonic()
    made_from = {"stage": "evaluation_rows", "rows": row_set_digest(row_ids)}
    folder = f"{ROWS_FOLDER}/{made_from['rows']}"
    found = find_manifest(workspace, folder)
    if found is not None:
        return found
    text = "".join(f"{row_id}\n" for row_id in sorted(row_ids))
    record = workspace.write(f"{folder}/{_ROWS_FILE}", text.encode())
    counts = {"rows": len(row_ids)}
    return commit_artefact(
        workspace, "evaluation_rows", made_from, [record], counts, {}, started=started, folder=folder
    )


def read_rows(workspace: Workspace, digest: str) -> list[str]:
    """Return the row ids that `store_rows` kept, sorted.

    Raises:
        StoreError: They are not there, or altered.
    """
    record = read_manifest(workspace, f"{ROWS_FOLDER}/{digest}").file(_ROWS_FILE)
    return workspace.read(record.path, record).decode().splitlines()


def work_on(bench: Workbench, training: Training, is_parent: bool = False) -> dict[str, str]:
    """Train a model and measure it, each unless it is done; return the folder of every benchmark's numbers.

    Args:
        bench: What all models share.
        training: Of this model.
        is_parent: Another training starts from its weights, so they are wanted even where all numbers are there.

    Returns:
        Folders by ``KIND/NAME`` of the benchmark.

    Raises:
        NonFiniteError: The training diverged, or a number is NaN.
        DataError: No row can be used, or a benchmark does not fit the model.
    """
    torch.set_num_threads(bench.threads)
    folders = {f"{b.kind}/{b.name}": measure_folder(training, b) for b in bench.benchmarks}
    lacking = [b for b in bench.benchmarks if find_manifest(bench.workspace, measure_folder(training, b)) is None]
    trained = training.kind == "untrained" or find_manifest(bench.workspace, training.folder) is not None
    if not lacking and (trained or not is_parent):
        return folders
    tokeniser = load_tokeniser(bench.model)
    model = fresh_model(bench.model, bench.lora, training.seed, bench.device)
    if trained and training.kind != "untrained":
        set_adapter(model, stored_adapter(bench.workspace, training.key))
    elif not trained:
        _train(bench, training, model, tokeniser)
    for benchmark in lacking:
        _measure(bench, training, model, tokeniser, benchmark)
    return folders


def measure_folder(training: Training, benchmark: Benchmark) -> str:
    """Where a model's numbers on a benchmark lie, relative to the workspace."""
    return f"{MEASURES_FOLDER}/{artefact_key(_measure_made_from(training, benchmark))}"


def _measure_made_from(training: Training, benchmark: Benchmark) -> dict[str, Any]:
    return {
        "stage": "evaluation_measure",
        "version": [MEASURE_VERSION, GENERATE_VERSION],
        "model": training.key,
        "benchmark": benchmark.digest,
    }


def read_items(workspace: Workspace, folder: str) -> list[Item]:
    """Return a model's numbers on a benchmark.

    Raises:
        StoreError: They are not there, or altered.
    """
    record = read_manifest(workspace, folder).file(ITEMS_FILE)
    return [json.loads(line) for line in workspace.read(record.path, record).decode().splitlines()]


def stored_adapter(workspace: Workspace, key: str) -> dict[str, torch.Tensor]:
    """Return a trained adapter by layout name.

    Raises:
        StoreError: It is not there, or altered.
    """
    record = read_manifest(workspace, f"{MODELS_FOLDER}/{key}").file(ADAPTER_FILE)
    return safetensors.torch.load(workspace.read(record.path, record))


def training_lengths(workspace: Workspace, keys: Iterable[str]) -> dict[str, float]:
    """Return the mean labelled tokens of the rows each model was trained on; other models are left out."""
    lengths = {}
    for key in sorted(keys):
        manifest = find_manifest(workspace, f"{MODELS_FOLDER}/{key}")
        if manifest is not None and manifest.counts.get("used"):
            lengths[key] = manifest.counts["labelled_tokens"] / manifest.counts["used"]
    return lengths


def _train(bench: Workbench, training: Training, model: PeftModel, tokeniser: Tokeniser) -> None:
    started = time.monotonic()
    settings = bench.evaluation
    counts: dict[str, int]
    if training.kind == "dpo_pairs":
        assert training.target is not None
        if training.parent is not None:
            set_adapter(model, stored_adapter(bench.workspace, training.parent))
        pairs = bench.pairs[training.target]
        sides = [
            (
                tokeniser.encode_answer(p.prompt, p.chosen, p.tools),
                tokeniser.encode_answer(p.prompt, p.rejected, p.tools),
            )
            for p in pairs
        ]
        losses = train_on_pairs(model, [p.pair_id for p in pairs], sides, settings.dpo, training.seed)
        counts = {"pairs": len(pairs)}
    else:
        ids, samples, counts = _training_set(bench, training, tokeniser)
        losses = train_on_rows(model, ids, samples, settings.training, training.seed)
    files = _write_adapter(bench.workspace, training.folder, model)
    facts = {"kind": training.kind, "seed": training.seed, "epoch_losses": losses, "target": training.target}
    commit_artefact(
        bench.workspace,
        "evaluation_model",
        training.made_from,
        files,
        counts,
        facts,
        started=started,
        folder=training.folder,
    )


def _training_set(
    bench: Workbench, training: Training, tokeniser: Tokeniser
) -> tuple[list[str], list[Sample], dict[str, int]]:
    if training.kind == "sft_pairs":
        assert training.target is not None
        pairs = bench.pairs[training.target]
        samples = [tokeniser.encode_answer(p.prompt, p.chosen, p.tools) for p in pairs]
        return [p.pair_id for p in pairs], samples, {"pairs": len(pairs), "tokens": _num_tokens(samples)}
    assert training.rows is not None
    wanted = set(read_rows(bench.workspace, training.rows))
    ids, samples, unusable = [], [], 0
    for row_id, text in pool_texts(bench.workspace, bench.pool, wanted):
        try:
            samples.append(tokeniser.encode(parse_conversation(text)))
            ids.append(row_id)
        except RowError:  # the pool fits the selector; this model's tokenizer or limit may be another
            unusable += 1
    if len(ids) + unusable != len(wanted):
        raise AccountingError(
            f"evaluation: {len(wanted)} rows asked for, {len(ids) + unusable} found in pool {bench.pool.key}. The "
            "selection belongs to another pool; run the job again."
        )
    counts = {"rows": len(wanted), "used": len(ids), "unusable": unusable, "tokens": _num_tokens(samples)}
    counts["labelled_tokens"] = sum(sample.num_labelled_tokens for sample in samples)
    return ids, samples, counts


def _num_tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def pool_texts(workspace: Workspace, pool: Manifest, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Yield row id and canonical conversation of rows of the pool, in its order, a shard in memory at a time."""
    skipped = skipped_rows(workspace, pool)
    for entry in pool.facts["shards"]:
        table = read_pool_entry(workspace, pool, entry, columns=["row_id", "conversation"], skipped=skipped)
        for row_id, text in zip(table["row_id"].to_pylist(), table["conversation"].to_pylist(), strict=True):
            if row_id in wanted:
                yield row_id, text


def _write_adapter(workspace: Workspace, folder: str, model: PeftModel) -> list[FileRecord]:
    with tempfile.TemporaryDirectory() as local:
        model.save_pretrained(local)
        content = {}
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            with open(os.path.join(local, name), "rb") as file:
                content[name] = file.read()
    settings = json.loads(content[ADAPTER_CONFIG_FILE])
    settings["target_modules"].sort()  # a set in PEFT, written in another order by every process
    content[ADAPTER_CONFIG_FILE] = (json.dumps(settings, indent=2) + "\n").encode()
    return [workspace.write(f"{folder}/{name}", data) for name, data in content.items()]


def _measure(
    bench: Workbench, training: Training, model: PeftModel, tokeniser: Tokeniser, benchmark: Benchmark
) -> None:
    started = time.monotonic()
    items = measure(model, tokeniser, benchmark, max_batch_tokens=bench.evaluation.training.max_batch_tokens)
    folder = measure_folder(training, benchmark)
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    record = bench.workspace.write(f"{folder}/{ITEMS_FILE}", text.encode(), num_rows=len(items))
    commit_artefact(
        bench.workspace,
        "evaluation_measure",
        _measure_made_from(training, benchmark),
        [record],
        {"items": len(items)},
        {"benchmark": benchmark.name, "kind": benchmark.kind},
        started=started,
        folder=folder,
    )
