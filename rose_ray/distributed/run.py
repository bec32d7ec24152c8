"""The job: stages in order, each found in the workspace or computed on the cluster.

Every artefact has a key made from what goes into it, so finding one is all that "already done" means: a second run does
nothing, a new target computes its bank and scores, a changed setting computes beside what exists.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from rose_ray.config.changes import changed_keys, recomputed_stages
from rose_ray.config.models import JobConfig, SelectionConfig, TargetConfig
from rose_ray.data.preferences import PreferencePair, check_pairs, read_pairs, take_shots
from rose_ray.distributed.actors import BankActor, ScoringSpec, cached_tokeniser, device_of
from rose_ray.distributed.features import compute_features
from rose_ray.distributed.resources import check_resources, cluster_nodes
from rose_ray.distributed.session import ray_session, root_cause
from rose_ray.distributed.tasks import score_target, select_target
from rose_ray.distributed.warmup import WarmupJob, run_warmup
from rose_ray.errors import AccountingError, ModelError, RoseError
from rose_ray.filesystem import child, expand, locate, read_bytes
from rose_ray.kernels.projection import make_projection
from rose_ray.model.base import with_absolute_paths
from rose_ray.model.checkpoint import ADAPTER_CONFIG_FILE, ADAPTER_FILE, adapter_digest, check_adapter_config
from rose_ray.model.describe import ModelIdentity, describe_model
from rose_ray.stages.bank import BANK_VERSION
from rose_ray.stages.features import FEATURES_VERSION, tokenize_shard
from rose_ray.stages.ingest import IngestSettings, PoolFile, ingest_file
from rose_ray.stages.pool import read_pool_shard, settle_pool, skipped_rows
from rose_ray.stages.score import SCORE_VERSION
from rose_ray.stages.select import SELECT_VERSION
from rose_ray.stages.warmup import WARMUP_VERSION, warmup_rows
from rose_ray.stores.features import checkpoint_file, find_shard
from rose_ray.stores.manifest import Manifest, artefact_key, commit_artefact, find_manifest
from rose_ray.stores.runs import StageRecord, last_run, write_run
from rose_ray.stores.workspace import FileRecord, Workspace

logger = logging.getLogger(__name__)

STAGES = ("ingest", "warmup", "bank", "features", "score", "select")


@dataclass
class RunResult:
    """What a run made or found.

    Attributes:
        stages: A record each, in order.
        pool, warmup: Their artefacts.
        banks, scores: By target.
        selections: By target, and ``training_set`` where one is configured.
    """

    stages: list[StageRecord] = field(default_factory=list)
    pool: Manifest | None = None
    warmup: Manifest | None = None
    banks: dict[str, Manifest] = field(default_factory=dict)
    scores: dict[str, Manifest] = field(default_factory=dict)
    selections: dict[str, Manifest] = field(default_factory=dict)


def run_job(config: JobConfig, *, stages: Collection[str] = STAGES, new_warmup: bool = False) -> RunResult:
    """Run a job, computing what the workspace does not hold yet.

    Args:
        config: The checked configuration. Relative paths start at the working directory.
        stages: Which of ``STAGES`` to run; what one of them needs must be among them.
        new_warmup: Choose the warm-up's rows from today's pool instead of keeping the pinned warm-up.

    Raises:
        RoseError: Whatever is wrong with configuration, data, model, workspace or cluster.
    """
    workspace = Workspace.open(config.workspace, create=True)
    _say_changes(workspace, config)
    job = _Job(workspace, config.model_copy(update={"model": with_absolute_paths(config.model)}))
    outcome = "finished"
    try:
        with ray_session(config.ray):
            check_resources(config, cluster_nodes())
            job.run(stages, new_warmup)
    except BaseException as error:
        cause = root_cause(error)
        outcome = f"{type(cause).__name__}: {cause}"
        raise (cause if isinstance(cause, RoseError) else error) from None
    finally:
        write_run(workspace, config.model_dump(mode="json"), job.result.stages, outcome)
    return job.result


def _say_changes(workspace: Workspace, config: JobConfig) -> None:
    previous = last_run(workspace)
    if previous is None:
        return
    for key, (old, new) in changed_keys(previous["config"], config.model_dump(mode="json")).items():
        stages = recomputed_stages(key)
        what = f"computes {', '.join(stages)} beside what exists" if stages else "changes no result"
        logger.info(f"changed since the last run: {key}: {old!r} -> {new!r}; {what}")


class _Job:
    """One run: the configuration, the workspace and what has been found or made so far."""

    def __init__(self, workspace: Workspace, config: JobConfig) -> None:
        self.workspace, self.config = workspace, config
        self.result = RunResult()
        self._identity: ModelIdentity | None = None

    def run(self, wanted: Collection[str], new_warmup: bool) -> None:
        pool = self.ingest()
        if "warmup" not in wanted:
            return
        # Read now what is needed later: a bad pair is said before GPUs are spent.
        pairs = {target.name: read_target_pairs(target) for target in self.config.targets}
        warmup = self.warm_up(pool, new_warmup)
        if "bank" in wanted:
            self.banks(warmup, pairs)
        if "features" in wanted:
            self.features(pool, warmup)
        if "score" in wanted:
            self.scores(pool, warmup)
        if "select" in wanted:
            self.select(pool)

    # ingest

    def ingest(self) -> Manifest:
        """Read every file of the pool, each in a task of its own, and settle duplicates among them."""
        started = time.monotonic()
        pool = self.config.pool
        files = [
            PoolFile(location, entry.format, entry.source, entry.source_field)
            for entry in pool.inputs
            for location in expand(entry.files)
        ]
        settings = IngestSettings(pool.shard_rows, pool.sample_fraction, pool.sample_seed)
        known = set(self.workspace.list_folder("pool"))
        tasks = [self._task(ingest_file, self.workspace, file, settings) for file in files]
        manifests: list[Manifest] = ray.get(tasks)
        settled: Manifest = ray.get(self._task(settle_pool, self.workspace, manifests))
        self.result.pool = settled
        self._note("ingest", settled, started, reused=settled.folder in known)
        return settled

    # warm-up

    def identity(self) -> ModelIdentity:
        """Describe the base model, once, on a worker: the driver may be a machine without it."""
        if self._identity is None:
            self._identity = ray.get(self._task(describe_model, self.config.model, self.config.lora))
        assert self._identity is not None
        return self._identity

    def warm_up(self, pool: Manifest, new_warmup: bool) -> Manifest:
        """Return the pinned warm-up of these settings; train it where there is none yet."""
        started = time.monotonic()
        settings = self._warmup_settings()
        pin = f"warmup/pins/{artefact_key(settings)}.json"
        if self.workspace.exists(pin) and not new_warmup:
            found = find_manifest(self.workspace, self.workspace.read_json(pin)["folder"])
            if found is not None:
                return self._warmup_done(found, started, reused=True)
            logger.warning("the pinned warm-up is damaged; training it again")
        if self.config.warmup.adapters is not None:
            made_from = {**settings, "row_ids": None}
            train: Callable[[dict[str, Any], str], Manifest] = self._import_adapters
        else:
            row_ids = self._warmup_row_ids(pool)
            made_from = {**settings, "row_ids": hashlib.sha256("".join(row_ids).encode()).hexdigest()}
            train = functools.partial(self._train, pool, row_ids)
        folder = f"warmup/{artefact_key(made_from)}"
        warmup = find_manifest(self.workspace, folder)
        reused = warmup is not None
        if warmup is None:
            warmup = train(made_from, folder)
        self.workspace.write_json(pin, {"folder": folder, "pool": pool.key})
        return self._warmup_done(warmup, started, reused=reused)

    def _warmup_settings(self) -> dict[str, Any]:
        config, identity = self.config, self.identity()
        common = {
            "stage": "warmup",
            "version": WARMUP_VERSION,
            "base": identity.base,
            "layout": identity.layout.digest,
            "lora": config.lora.model_dump(mode="json"),
        }
        if config.warmup.adapters is not None:
            folders = [locate(name) for name in config.warmup.adapters]
            return {
                **common,
                "adapters": [adapter_digest(folder) for folder in folders],
                "weights": config.warmup.adapter_weights,
            }
        not_numeric = {"max_batch_tokens", "workers", "zero_stage", "adapters", "adapter_weights"}
        return {
            **common,
            "text": identity.text,
            "max_tokens": config.model.max_tokens,
            "dtype": config.model.dtype,
            "warmup": config.warmup.model_dump(mode="json", exclude=not_numeric),
        }

    def _warmup_row_ids(self, pool: Manifest) -> list[str]:
        skipped = skipped_rows(self.workspace, pool)
        read = [
            self._task(_shard_row_ids, self.workspace, pool, entry["shard"], skipped.get(entry["shard"], []))
            for entry in pool.facts["shards"]
        ]
        row_ids = [row_id for part in ray.get(read) for row_id in part]
        return warmup_rows(row_ids, self.config.warmup.fraction, self.config.warmup.seed)

    def _train(self, pool: Manifest, row_ids: list[str], made_from: dict[str, Any], folder: str) -> Manifest:
        started = time.monotonic()
        config = self.config
        samples, num_rejected = ray.get(
            self._task(_warmup_samples, self.workspace, pool, row_ids, config.model, f"{folder}/samples.parquet")
        )
        job = WarmupJob(
            self.workspace,
            folder,
            samples,
            config.model,
            config.lora,
            config.warmup,
            device_of(config.ray),
            config.ray.threads_per_actor,
        )
        checkpoints = run_warmup(
            job, cpus_per_worker=config.ray.cpus_per_actor, gpus_per_worker=config.ray.gpus_per_actor
        )
        files = [samples, *(FileRecord(**record) for c in checkpoints for record in c.pop("files"))]
        return self._commit_warmup(made_from, folder, checkpoints, files, len(row_ids), num_rejected, started)

    def _import_adapters(self, made_from: dict[str, Any], folder: str) -> Manifest:
        started = time.monotonic()
        config = self.config
        assert config.warmup.adapters is not None
        weights = config.warmup.adapter_weights or [1.0] * len(config.warmup.adapters)
        checkpoints, files = [], []
        for number, (name, weight) in enumerate(zip(config.warmup.adapters, weights, strict=True), start=1):
            source = locate(name)
            lora = config.lora
            check_adapter_config(source, rank=lora.rank, alpha=lora.alpha, target_modules=lora.target_modules)
            for file in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
                data = read_bytes(child(source, file))
                files.append(self.workspace.write(f"{folder}/checkpoint-{number}/{file}", data))
            checkpoints.append({"name": f"checkpoint-{number}", "mean_learning_rate": weight, "from": name})
        logger.info(
            "warm-up: using your adapters; they come without Adam moments, so features are plain gradients (sgd)"
        )
        return self._commit_warmup(made_from, folder, checkpoints, files, 0, 0, started)

    def _commit_warmup(
        self,
        made_from: dict[str, Any],
        folder: str,
        checkpoints: list[dict[str, Any]],
        files: list[FileRecord],
        num_rows: int,
        num_rejected: int,
        started: float,
    ) -> Manifest:
        for checkpoint in checkpoints:
            location = self.workspace.location(f"{folder}/{checkpoint['name']}")
            checkpoint["adapter"] = adapter_digest(location)
        facts = {"checkpoints": checkpoints, "adam_eps": self.config.warmup.adam_eps}
        counts = {"rows": num_rows, "trained": num_rows - num_rejected, "rejected": num_rejected}
        return commit_artefact(
            self.workspace, "warmup", made_from, files, counts, facts, started=started, folder=folder
        )

    def _warmup_done(self, warmup: Manifest, started: float, *, reused: bool) -> Manifest:
        self.result.warmup = warmup
        self._note("warmup", warmup, started, reused=reused)
        # Refuse a checkpoint of another model here, where the message is near its cause.
        if warmup.made_from["layout"] != self.identity().layout.digest:
            raise ModelError(
                f"{warmup.folder}: its adapters have another layout than this model. Delete it and run again."
            )
        return warmup

    # bank

    def space(self, warmup: Manifest) -> dict[str, Any]:
        """What features and bank must share to be multiplied."""
        identity, settings = self.identity(), self.config.gradients.projection
        projection = make_projection(settings.kind, settings.dim, settings.seed, identity.layout.num_parameters)
        return {
            "base": identity.base,
            "adapters": [checkpoint["adapter"] for checkpoint in warmup.facts["checkpoints"]],
            "layout": identity.layout.digest,
            "projection": projection.identity(),
        }

    def _encoding(self) -> dict[str, Any]:
        model = self.config.model
        return {"text": self.identity().text, "max_tokens": model.max_tokens, "dtype": model.dtype}

    def spec(self, warmup: Manifest) -> ScoringSpec:
        """What scoring actors need to know."""
        config = self.config
        return ScoringSpec(
            workspace=self.workspace,
            model=config.model,
            lora=config.lora,
            gradients=config.gradients,
            layout=self.identity().layout,
            checkpoints=tuple(f"{warmup.folder}/{c['name']}" for c in warmup.facts["checkpoints"]),
            device=device_of(config.ray),
            threads=config.ray.threads_per_actor,
            features_key=artefact_key(self.features_made_from(warmup)),
        )

    def bank_made_from(self, warmup: Manifest, target: TargetConfig, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
        """What a bank depends on: not the objective, nor how scores are aggregated."""
        official = target.encoding == "rose_official"
        return {
            "stage": "bank",
            "version": BANK_VERSION,
            "space": self.space(warmup),
            **self._encoding(),
            "pairs": hashlib.sha256(repr([asdict(pair) for pair in pairs]).encode()).hexdigest(),
            "encoding": target.encoding,
            "official": [target.official_cut, target.dpo_beta] if official else None,
        }

    def banks(self, warmup: Manifest, pairs: dict[str, list[PreferencePair]]) -> None:
        """Find or compute the bank of every target; the model is loaded once for all that are missing."""
        actor: Any = None
        for target in self.config.targets:
            started = time.monotonic()
            made_from = self.bank_made_from(warmup, target, pairs[target.name])
            bank = find_manifest(self.workspace, f"bank/{artefact_key(made_from)}")
            reused = bank is not None
            if bank is None:
                actor = actor or self._actor(BankActor, self.spec(warmup))
                num_pairs, num_checkpoints = len(pairs[target.name]), len(warmup.facts["checkpoints"])
                logger.info(f"bank {target.name}: {num_pairs} pairs x {num_checkpoints} checkpoints")
                tables: list[pa.Table] = ray.get(actor.bank.remote(target, pairs[target.name]))
                bank = self._commit_bank(made_from, warmup, tables, started)
            self.result.banks[target.name] = bank
            self._note(f"bank {target.name}", bank, started, reused=reused)
        if actor is not None:
            ray.kill(actor)

    def _commit_bank(
        self, made_from: dict[str, Any], warmup: Manifest, tables: list[pa.Table], started: float
    ) -> Manifest:
        folder = f"bank/{artefact_key(made_from)}"
        names = [checkpoint["name"] for checkpoint in warmup.facts["checkpoints"]]
        files = [
            self.workspace.write_table(f"{folder}/{checkpoint_file(name)}", table)
            for name, table in zip(names, tables, strict=True)
        ]
        subtasks = tables[0]["subtask"].to_pylist()
        facts = {
            "space": made_from["space"],
            "checkpoints": names,
            "subtasks": {name: subtasks.count(name) for name in dict.fromkeys(subtasks)},
            "num_tokens_cut": sum(sum(tables[0][f"num_tokens_cut_{side}"].to_pylist()) for side in "wl"),
        }
        counts = {"pairs": tables[0].num_rows, "checkpoints": len(tables)}
        return commit_artefact(self.workspace, "bank", made_from, files, counts, facts, started=started)

    # features

    def features_made_from(self, warmup: Manifest) -> dict[str, Any]:
        """What a feature depends on besides its row: not the pool, the workers or the batches."""
        return {
            "stage": "features",
            "version": FEATURES_VERSION,
            "space": self.space(warmup),
            **self._encoding(),
            "adam": self.config.gradients.adam,
            "stored_dtype": self.config.gradients.stored_dtype,
        }

    def features(self, pool: Manifest, warmup: Manifest) -> None:
        """Compute the features of every shard that has none yet."""
        started = time.monotonic()
        spec = self.spec(warmup)
        skipped = skipped_rows(self.workspace, pool)
        missing = [
            entry
            for entry in pool.facts["shards"]
            if find_shard(self.workspace, spec.features_key, entry["shard"], skipped.get(entry["shard"], [])) is None
        ]
        folder = f"features/{spec.features_key}"
        self.workspace.write_json(f"{folder}/space.json", self.features_made_from(warmup))
        if missing:
            compute_features(spec, pool, missing, skipped, self.config.ray)
        self._account_features(pool, spec.features_key, folder, skipped, started, reused=not missing)

    def _account_features(
        self, pool: Manifest, key: str, folder: str, skipped: dict[str, list[str]], started: float, *, reused: bool
    ) -> None:
        totals = {"rows": 0, "scored": 0, "rejected": 0}
        rows_cut = num_bytes = 0
        for entry in pool.facts["shards"]:
            receipt = find_shard(self.workspace, key, entry["shard"], skipped.get(entry["shard"], []))
            if receipt is None or receipt.counts["rows"] < entry["num_rows"] - entry["num_skipped"]:
                raise AccountingError(f"features: shard {entry['shard']} is not complete. Run again.")
            totals = {name: totals[name] + receipt.counts[name] for name in totals}
            rows_cut += receipt.facts["num_rows_cut"]
            num_bytes += receipt.num_bytes
        if totals["rows"] != totals["scored"] + totals["rejected"]:
            raise AccountingError(
                f"features: {totals['rows']} rows, {totals['scored']} scored, {totals['rejected']} rejected."
            )
        seconds = round(time.monotonic() - started, 3)
        totals[f"cut at {self.config.model.max_tokens} tokens"] = rows_cut
        self.result.stages.append(StageRecord("features", key, folder, reused, seconds, totals, num_bytes))
        _log_stage(self.result.stages[-1])

    # score and select

    def scores(self, pool: Manifest, warmup: Manifest) -> None:
        """Reduce the score table of every target."""
        checkpoints = warmup.facts["checkpoints"]
        key = artefact_key(self.features_made_from(warmup))
        features = {
            "key": key,
            "space": self.space(warmup),
            "checkpoints": [c["name"] for c in checkpoints],
            "mean_learning_rates": [c["mean_learning_rate"] for c in checkpoints],
            "adam": self.config.gradients.adam,
            "stored_dtype": self.config.gradients.stored_dtype,
            "template": self.config.model.template,
            "text": self.identity().text,
            "warmup": warmup.folder,
            # Where v is far below eps squared, Adam's preconditioner is all but off.
            "median_exp_avg_sq": [c.get("median_exp_avg_sq") for c in checkpoints],
            "adam_eps": warmup.facts["adam_eps"],
        }
        for target in self.config.targets:
            started = time.monotonic()
            bank = self.result.banks[target.name]
            made_from = {
                "stage": "score",
                "version": SCORE_VERSION,
                "features": key,
                "weights": features["mean_learning_rates"],
                "pool": pool.key,
                "bank": bank.key,
                "objective": target.objective,
                "dpo_beta": target.dpo_beta if target.objective == "dpo_weighted" else None,
                "normalize": target.normalize,
                "aggregation": target.aggregation,
            }
            folder = f"scores/{target.name}/{artefact_key(made_from)}"
            scores = find_manifest(self.workspace, folder)
            reused = scores is not None
            if scores is None:
                scores = ray.get(
                    self._task(score_target, self.workspace, pool, features, bank, target, made_from, folder)
                )
            assert scores is not None
            self.result.scores[target.name] = scores
            self._note(f"score {target.name}", scores, started, reused=reused)

    def select(self, pool: Manifest) -> None:
        """Select for every target, and for the joint training set where one is configured."""
        for target in self.config.targets:
            self._select(pool, target.name, [target.name], target.selection)
        joint = self.config.training_set
        if joint is not None:
            names = joint.targets or [target.name for target in self.config.targets]
            self._select(pool, "training_set", names, joint.selection)

    def _select(self, pool: Manifest, name: str, targets: list[str], selection: SelectionConfig) -> None:
        started = time.monotonic()
        scores = [self.result.scores[target] for target in targets]
        made_from = {
            "stage": "select",
            "version": SELECT_VERSION,
            "scores": [m.key for m in scores],
            "targets": targets,
            "selection": selection.model_dump(mode="json"),
        }
        folder = f"selections/{name}/{artefact_key(made_from)}"
        chosen = find_manifest(self.workspace, folder)
        reused = chosen is not None
        if chosen is None:
            chosen = ray.get(
                self._task(select_target, self.workspace, pool, scores, name, selection, made_from, folder)
            )
        assert chosen is not None
        self.workspace.write_json(f"selections/{name}/latest.json", {"folder": folder})
        self.result.selections[name] = chosen
        self._note(f"select {name}", chosen, started, reused=reused)
        for warning in chosen.facts["summary"]["warnings"]:
            logger.warning(f"{name}: {warning}")

    # shared

    def _task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return ray.remote(num_cpus=self.config.ray.cpus_per_task)(function).remote(*arguments)

    def _actor(self, kind: type, *arguments: Any) -> Any:
        settings = self.config.ray
        return ray.remote(num_cpus=settings.cpus_per_actor, num_gpus=settings.gpus_per_actor)(kind).remote(*arguments)

    def _note(self, stage: str, manifest: Manifest, started: float, *, reused: bool) -> None:
        seconds = round(time.monotonic() - started, 3)
        record = StageRecord(stage, manifest.key, manifest.folder, reused, seconds, manifest.counts, manifest.num_bytes)
        self.result.stages.append(record)
        _log_stage(record)


def read_target_pairs(target: TargetConfig) -> list[PreferencePair]:
    """Read and check all pairs of a target.

    Raises:
        DataError: A file cannot be read.
        PairError: Pairs that cannot be used, or too few of them.
    """
    pairs = [
        pair
        for entry in target.pairs
        for pair in read_pairs(
            expand(entry.files),
            target=target.name,
            format=entry.format,
            subtask=entry.subtask,
            subtask_field=entry.subtask_field,
            subtask_blocks=entry.subtask_blocks,
        )
    ]
    check_pairs(pairs, target=target.name)
    return take_shots(pairs, target.shots, target=target.name)


def _shard_row_ids(workspace: Workspace, pool: Manifest, shard: str, skipped: list[str]) -> list[str]:
    table = read_pool_shard(workspace, pool, shard, columns=["row_id"], skipped={shard: skipped})
    row_ids: list[str] = table["row_id"].to_pylist()
    return row_ids


def _warmup_samples(
    workspace: Workspace, pool: Manifest, row_ids: list[str], model: Any, path: str
) -> tuple[FileRecord, int]:
    wanted = pa.array(row_ids, pa.string())
    skipped = skipped_rows(workspace, pool)
    parts = []
    for entry in pool.facts["shards"]:
        table = read_pool_shard(workspace, pool, entry["shard"], columns=["row_id", "conversation"], skipped=skipped)
        parts.append(table.filter(pc.is_in(table["row_id"], value_set=wanted)))
    tokens, rejected = tokenize_shard(pa.concat_tables(parts), cached_tokeniser(model))
    if tokens.num_rows == 0:
        raise AccountingError(
            f"warm-up: none of {len(row_ids)} rows can be tokenised: {rejected.slice(0, 1).to_pylist()}"
        )
    return workspace.write_table(path, tokens), rejected.num_rows


def _log_stage(record: StageRecord) -> None:
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in record.counts.items())
    verb = "found" if record.reused else "made"
    size = f", {record.num_bytes / 1e6:,.1f} MB" if record.num_bytes >= 1e5 else ""
    logger.info(f"{record.stage}: {verb} {record.folder} in {record.seconds:.1f} s: {counts}{size}")
