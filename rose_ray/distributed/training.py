"""One worker of the warm-up training: DeepSpeed's engine, PEFT's LoRA, a checkpoint an epoch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.config.warmup import WarmupConfig
from rose_ray.distributed.engine import import_deepspeed
from rose_ray.distributed.partitioned import load_partitioned
from rose_ray.distributed.resume import find_state, read_tensors, save_state
from rose_ray.distributed.sharded import MOMENT_KEYS, read_state, set_moments, set_weights
from rose_ray.errors import NonFiniteError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.batch import pad_batch
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
from rose_ray.model.values import sample_values
from rose_ray.stages.tokens import read_samples
from rose_ray.stages.warmup import MicroBatch, TrainingStep, plan_training
from rose_ray.stores.workspace import FileRecord, Workspace


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


class WarmupTrainer:
    """One worker's model, optimizer and place in the plan; it begins where an unfinished training stopped.

    Attributes:
        epochs: An entry per finished epoch; its files are known to rank 0 alone.
    """

    def __init__(self, job: WarmupJob, *, rank: int, num_workers: int) -> None:
        self.job, self.rank, self.num_workers = job, rank, num_workers
        self.samples, self.steps = _plan(job, num_workers)
        torch.manual_seed(job.warmup.seed)
        if job.warmup.zero_stage == 3:
            base = load_partitioned(job.model, _zero_config(job), import_deepspeed(job.device))
        else:
            base = load_base(job.model, device=job.device)
        self.model = attach_adapter(base, job.lora, dropout=job.lora.dropout)
        if job.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.model.train()
        self.optimizer = _adam(self.model, job.warmup)
        self.num_updates, self.loss_sum = 0, 0.0
        self.epochs: list[dict[str, Any]] = []
        self._start()
        done = sum(step.num_samples for step in self.steps[: self.num_updates])
        self._report("start", sum(step.num_samples for step in self.steps), done)

    def _start(self) -> None:
        job = self.job
        saved = find_state(job.workspace, job.folder, job.samples_file)
        if saved is None:
            self.engine = _engine(self.model, self.optimizer, job)
            return
        tensors = read_tensors(job.workspace, saved)
        set_weights(self.model, tensors["adapter"])
        self.engine = _engine(self.model, self.optimizer, job)
        self._step_of_nothing()
        set_moments(self.model, self.optimizer, job.warmup.zero_stage, tensors, saved.num_updates)
        self.num_updates, self.loss_sum, self.epochs = saved.num_updates, saved.loss_sum, list(saved.epochs)

    def _step_of_nothing(self) -> None:
        # Adam makes its state, and DeepSpeed its view of it, at the first step. Rate and gradients of 0 move nothing.
        shortest = min(range(len(self.samples)), key=lambda row: len(self.samples[row].input_ids))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._backward(MicroBatch([shortest], counts=False), weight=0.0, last=True)

    def train_epoch(self) -> dict[str, Any]:
        """Take the steps that the next unfinished epoch still lacks, write its checkpoint and return its entry."""
        epoch = len(self.epochs) + 1
        steps = [step for step in self.steps if step.epoch == epoch]
        left = [step for step in self.steps[self.num_updates :] if step.epoch == epoch]
        for step in left:
            self.loss_sum += self.step(step)
            if self.num_updates % self.job.warmup.save_steps == 0 and step is not left[-1]:
                self._save(self._tensors())
        tensors = self._tensors()
        mean_rate = sum(step.learning_rate for step in steps) / len(steps)
        name = f"checkpoint-{epoch}"
        files = self._write(name, epoch, mean_rate, tensors) if self.rank == 0 else []
        entry = {
            "name": name,
            "mean_learning_rate": mean_rate,
            "loss": self.loss_sum / sum(step.num_samples for step in steps),
            "num_updates": self.num_updates,
            "median_exp_avg_sq": _median(tensors["exp_avg_sq"]),
            "files": [asdict(record) for record in files],
        }
        self.epochs.append(entry)
        self.loss_sum = 0.0
        self._save(tensors)
        return entry

    def step(self, step: TrainingStep) -> float:
        """Take one optimizer step and return the sum of its samples' losses, over all workers."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = step.learning_rate
        # Dropout's own stream: the same whatever ran before, another for each step and worker.
        torch.manual_seed(1_000_003 * self.job.warmup.seed + 1_009 * self.num_updates + self.rank)
        own = step.micro_batches[self.rank]
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        for number, micro_batch in enumerate(own):
            # DeepSpeed averages over the workers; the factor turns that into the mean over the step's samples.
            weight = self.num_workers / step.num_samples if micro_batch.counts else 0.0
            losses_B = self._backward(micro_batch, weight, last=number == len(own) - 1)
            if micro_batch.counts:
                total += losses_B.double().sum()
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

    def _backward(self, micro_batch: MicroBatch, weight: float, *, last: bool) -> Tensor:
        batch = pad_batch([self.samples[row] for row in micro_batch.rows], device=self.job.device)
        losses_B = sample_values(self.engine, batch, "mean_loss")
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(losses_B.sum() * weight, scale_wrt_gas=False)
        self.engine.step()
        return losses_B.detach()

    def _report(self, method: str, *arguments: Any) -> None:
        if self.rank == 0 and self.job.board is not None:
            getattr(self.job.board, method).remote(*arguments)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return read_state(self.model, self.optimizer, self.job.warmup.zero_stage)

    def _save(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        if self.rank == 0:
            job = self.job
            place = (self.num_updates, self.loss_sum, self.epochs)
            save_state(job.workspace, job.folder, job.samples_file, tensors, *place)

    def _write(
        self, name: str, epoch: int, mean_rate: float, tensors: Mapping[str, Mapping[str, Tensor]]
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
        content: dict[str, bytes] = {MOMENTS_FILE: moments_bytes(*(tensors[key] for key in MOMENT_KEYS))}
        with tempfile.TemporaryDirectory() as local:
            # PEFT takes the adapter out of these by the model's own names; the model itself may hold pieces alone.
            whole = {f"{name.removesuffix('.weight')}.default.weight": t for name, t in tensors["adapter"].items()}
            self.model.save_pretrained(local, state_dict=whole)
            with open(os.path.join(local, ADAPTER_FILE), "rb") as file:
                content[ADAPTER_FILE] = file.read()
            with open(os.path.join(local, ADAPTER_CONFIG_FILE), encoding="utf-8") as text:
                adapter_config = json.load(text)
            adapter_config["target_modules"].sort()  # a set in PEFT, written in another order by every process
            content[ADAPTER_CONFIG_FILE] = (json.dumps(adapter_config, indent=2) + "\n").encode()
        workspace = self.job.workspace
        records = [workspace.write(f"{folder}/{file_name}", data) for file_name, data in content.items()]
        return [*records, workspace.write_json(f"{folder}/{STATE_FILE}", state_json(state))]


def _plan(job: WarmupJob, num_workers: int) -> tuple[list[Any], list[TrainingStep]]:
    table = job.workspace.read_table(job.samples_file.path, job.samples_file)
    samples, settings = read_samples(table), job.warmup
    steps = plan_training(
        table["row_id"].to_pylist(),
        [len(sample.input_ids) for sample in samples],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        max_batch_tokens=settings.max_batch_tokens,
        num_workers=num_workers,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        seed=settings.seed,
    )
    return samples, steps


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
    engine, *_ = import_deepspeed(job.device).initialize(model=model, optimizer=optimizer, config=_zero_config(job))
    return engine


def _zero_config(job: WarmupJob) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job.warmup.max_grad_norm,
        "zero_optimization": {"stage": job.warmup.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
