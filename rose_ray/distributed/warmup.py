"""The warm-up training: Ray Train's workers, DeepSpeed's engine, PEFT's LoRA."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.config.models import LoraConfig, ModelConfig, WarmupConfig
from rose_ray.distributed.engine import import_deepspeed
from rose_ray.distributed.progress import shown_progress
from rose_ray.errors import NonFiniteError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    MOMENTS_FILE,
    STATE_FILE,
    OptimizerState,
    moments_bytes,
    state_json,
)
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.scoring import pad_batch, sample_values
from rose_ray.stages.features import read_samples
from rose_ray.stages.warmup import TrainingStep, plan_training
from rose_ray.stores.workspace import FileRecord, Workspace

_TRAIN_FOLDER = "ray_train"
_TRAINING_FILE = "training.json"
"""What rank 0 knows of every checkpoint; Ray Train hands metrics back only with a checkpoint of its own."""


@dataclass(frozen=True)
class WarmupJob:
    """Everything a worker needs; travels to it by pickle.

    Attributes:
        workspace: Where samples are read and checkpoints written.
        folder: Of the artefact, relative to the workspace.
        samples_file: Tokenised samples (schema ``TOKENS``), relative to the workspace.
        device: ``cpu`` or ``cuda``.
        threads: Torch threads of each worker.
        board: Where rank 0 reports its progress; see `shown_progress`.
    """

    workspace: Workspace
    folder: str
    samples_file: FileRecord
    model: ModelConfig
    lora: LoraConfig
    warmup: WarmupConfig
    device: str
    threads: int
    board: Any = None


def run_warmup(job: WarmupJob, *, cpus_per_worker: float, gpus_per_worker: float) -> list[dict[str, Any]]:
    """Train on ``job.warmup.workers`` workers and return an entry per checkpoint.

    Each entry holds ``name``, ``mean_learning_rate``, ``loss`` (mean over the epoch's samples, nats) and ``files``.

    Raises:
        NonFiniteError: The loss became NaN or infinite.
        ResourceError: Ray Train could not run the workers.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from rose_ray.distributed.session import root_cause

    resources = {"CPU": cpus_per_worker} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    with (
        tempfile.TemporaryDirectory(prefix="rose-ray-train-") as storage,
        shown_progress("warm-up", "samples") as board,
    ):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": replace(job, board=board)},
            scaling_config=ScalingConfig(
                num_workers=job.warmup.workers, use_gpu=job.device == "cuda", resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="warmup", failure_config=FailureConfig(max_failures=0), **_train_storage(job, storage)
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise root_cause(error) from error
        finally:
            job.workspace.delete_folder(f"{job.folder}/{_TRAIN_FOLDER}")
    checkpoints: list[dict[str, Any]] = job.workspace.read_json(f"{job.folder}/{_TRAINING_FILE}")
    return checkpoints


def _train_storage(job: WarmupJob, local: str) -> dict[str, Any]:
    # Ray Train keeps its own small state beside the run. Several nodes need a place that all of them see.
    import ray

    if len([node for node in ray.nodes() if node["Alive"]]) == 1:
        return {"storage_path": local}
    root = job.workspace.location(f"{job.folder}/{_TRAIN_FOLDER}")
    return {"storage_path": root.path, "storage_filesystem": root.filesystem}


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the whole training, one report per epoch."""
    import ray.train.torch

    job: WarmupJob = config["job"]
    context = ray.train.get_context()
    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.cuda.set_device(ray.train.torch.get_device())  # workers of one node see all of its GPUs
    trainer = WarmupTrainer(job, rank=context.get_world_rank(), num_workers=context.get_world_size())
    checkpoints: list[dict[str, Any]] = []
    for epoch in range(1, job.warmup.epochs + 1):
        checkpoints.append(trainer.train_epoch(epoch))
        ray.train.report({"epoch": epoch, "loss": checkpoints[-1]["loss"]})
    if context.get_world_rank() == 0:
        job.workspace.write_json(f"{job.folder}/{_TRAINING_FILE}", checkpoints)


class WarmupTrainer:
    """One worker's model, optimizer and place in the plan."""

    def __init__(self, job: WarmupJob, *, rank: int, num_workers: int) -> None:
        self.job, self.rank, self.num_workers = job, rank, num_workers
        table = job.workspace.read_table(job.samples_file.path, job.samples_file)
        self.samples = read_samples(table)
        settings = job.warmup
        self.steps = plan_training(
            table["row_id"].to_pylist(),
            [len(sample.input_ids) for sample in self.samples],
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            num_workers=num_workers,
            learning_rate=settings.learning_rate,
            warmup_ratio=settings.warmup_ratio,
            seed=settings.seed,
        )
        torch.manual_seed(settings.seed)
        self.model = attach_adapter(load_base(job.model, device=job.device), job.lora, dropout=job.lora.dropout)
        if job.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        self.optimizer = _adam(self.model, settings)
        self.engine = _engine(self.model, self.optimizer, job)
        self.num_updates = 0
        self._report("set_total", sum(step.num_samples for step in self.steps))

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Take the epoch's steps and write its checkpoint."""
        steps = [step for step in self.steps if step.epoch == epoch]
        loss_sum = sum(self.step(step) for step in steps)
        mean_rate = sum(step.learning_rate for step in steps) / len(steps)
        moments = {key: self._moments(key) for key in ("exp_avg", "exp_avg_sq")}  # collective: every rank takes part
        name = f"checkpoint-{epoch}"
        files = self._write(name, epoch, mean_rate, moments) if self.rank == 0 else []
        num_samples = sum(step.num_samples for step in steps)
        return {
            "name": name,
            "mean_learning_rate": mean_rate,
            "loss": loss_sum / num_samples,
            "num_updates": self.num_updates,
            "median_exp_avg_sq": _median(moments["exp_avg_sq"]),
            "files": [asdict(record) for record in files],
        }

    def step(self, step: TrainingStep) -> float:
        """Take one optimizer step and return the sum of its samples' losses, over all workers."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = step.learning_rate
        # Dropout's own stream: the same whatever ran before, another for each step and worker.
        torch.manual_seed(1_000_003 * self.job.warmup.seed + 1_009 * self.num_updates + self.rank)
        own = step.micro_batches[self.rank]
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        for number, micro_batch in enumerate(own):
            batch = pad_batch([self.samples[row] for row in micro_batch.rows], device=self.job.device)
            losses_B = sample_values(self.engine, batch, "mean_loss")
            if micro_batch.counts:
                total += losses_B.detach().double().sum()
            self.engine.set_gradient_accumulation_boundary(number == len(own) - 1)
            # DeepSpeed averages over the workers; the factor turns that into the mean over the step's samples.
            weight = self.num_workers / step.num_samples if micro_batch.counts else 0.0
            self.engine.backward(losses_B.sum() * weight, scale_wrt_gas=False)
            self.engine.step()
        if self.num_workers > 1:
            torch.distributed.all_reduce(total)
        if not torch.isfinite(total):
            raise NonFiniteError(
                f"warm-up: the loss of step {self.num_updates + 1} is {total.item()}. Lower `warmup.learning_rate`, "
                "or look at the base model's weights and `model.dtype`."
            )
        self.num_updates += 1
        self._report("advance", step.num_samples, f"loss {total.item() / step.num_samples:.3f}")
        return total.item()

    def _report(self, method: str, *arguments: Any) -> None:
        if self.rank == 0 and self.job.board is not None:
            getattr(self.job.board, method).remote(*arguments)

    def _moments(self, key: str) -> dict[str, Tensor]:
        parameters = adapter_parameters(self.model)
        if self.job.warmup.zero_stage == 0:
            return {name: self.optimizer.state[p][key].detach().float().cpu() for name, p in parameters.items()}
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {name: safe_get_full_optimizer_state(p, key) for name, p in parameters.items()}
        return {name: tensor.detach().float().cpu().clone() for name, tensor in moments.items()}

    def _write(
        self, name: str, epoch: int, mean_rate: float, moments: Mapping[str, Mapping[str, Tensor]]
    ) -> list[FileRecord]:
        settings, folder = self.job.warmup, f"{self.job.folder}/{name}"
        state = OptimizerState(
            num_updates=self.num_updates,
            mean_learning_rate=mean_rate,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            max_grad_norm=settings.max_grad_norm,
            epoch=epoch,
        )
        content: dict[str, bytes] = {MOMENTS_FILE: moments_bytes(moments["exp_avg"], moments["exp_avg_sq"])}
        with tempfile.TemporaryDirectory() as local:
            self.model.save_pretrained(local)
            for file_name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
                with open(os.path.join(local, file_name), "rb") as file:
                    content[file_name] = file.read()
        workspace = self.job.workspace
        records = [workspace.write(f"{folder}/{file_name}", data) for file_name, data in content.items()]
        return [*records, workspace.write_json(f"{folder}/{STATE_FILE}", state_json(state))]


def _median(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).median())


def _adam(model: nn.Module, settings: WarmupConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        adapter_parameters(model).values(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        foreach=False,
    )


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, job: WarmupJob) -> Any:
    engine, *_ = import_deepspeed(job.device).initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": job.warmup.max_grad_norm,
            "zero_optimization": {"stage": job.warmup.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    return engine
