"""Scoring models held by DeepSpeed.

Features need one frozen model and gradients with respect to activations, so DeepSpeed's part is to hold the
parameters: whole (ZeRO stage 0), or partitioned and gathered layer by layer (stage 3), on the device or in host memory.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rose_ray.config.model import LoraConfig, ModelConfig
from rose_ray.distributed.partitioned import load_partitioned
from rose_ray.errors import ResourceError
from rose_ray.model.base import attach_adapter, load_base
from rose_ray.model.layout import adapter_parameters
from rose_ray.model.scoring import ScoringModel


@dataclass(frozen=True)
class ProcessGroup:
    """One rank's place among the processes that share a model. The default is a group of one."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0


def load_scoring_model(
    model: ModelConfig,
    lora: LoraConfig,
    *,
    device: str,
    group: ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> ScoringModel:
    """Load the base model with an empty adapter slot, held as ``model.loader`` says.

    Args:
        model: Base model, type, loader and DeepSpeed settings.
        lora: Shape of the adapter slot. Its dropout is left out: features are made without.
        device: ``cpu`` or ``cuda``.
        group: Ranks that share the model under ZeRO stage 3.
        dtype: Overrides the configured type; float64 in tests.

    Raises:
        ResourceError: ``cuda`` is asked for and there is none.
        ModelError: The model or its adapter cannot be made.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("ray.gpus_per_actor asks for a GPU, but torch sees none in this actor.")
    deepspeed = None if model.loader == "plain" else deepspeed_in_group(device, group or ProcessGroup())
    if deepspeed is not None and model.deepspeed.zero_stage == 3 and dtype is None:
        base = load_partitioned(model, _zero_config(model), deepspeed)
    else:  # DeepSpeed makes no parameters of another type than the configured one; from the CPU it cuts them up whole
        in_parts = deepspeed is not None and model.deepspeed.zero_stage == 3
        base = load_base(model, device="cpu" if in_parts else device, dtype=dtype)
    peft_model = attach_adapter(base, lora, dropout=0.0)
    # Scored in the base's type: float32 products on a GPU would cost more than the rest of the layer.
    for parameter in adapter_parameters(peft_model).values():
        parameter.data = parameter.data.to(dtype or getattr(torch, model.dtype))
    if deepspeed is None:
        return ScoringModel(_checkpointed(peft_model.to(device), model), device, **_scoring_settings(model))
    return DeepSpeedScoringModel(peft_model, model, device=device, deepspeed=deepspeed)


class DeepSpeedScoringModel(ScoringModel):
    """A scoring model whose parameters DeepSpeed holds."""

    def __init__(self, peft_model: nn.Module, model: ModelConfig, *, device: str, deepspeed: Any) -> None:
        stage = model.deepspeed.zero_stage
        # Stage 0 wants an optimizer; one that is never stepped costs nothing.
        adapter = list(adapter_parameters(peft_model).values())
        optimizer = torch.optim.SGD(adapter, lr=0.0) if stage == 0 else None
        config = _zero_config(model)
        self.engine, *_ = deepspeed.initialize(model=peft_model, optimizer=optimizer, config=config)
        # The engine's own forward insists on its own backward; the module underneath keeps DeepSpeed's hooks.
        super().__init__(_checkpointed(self.engine.module, model), device, **_scoring_settings(model))

    def _slot(self) -> dict[str, Tensor]:
        if self.engine.zero_optimization_stage() < 3:
            return super()._slot()
        # Partitioned parameters come and go; the adapter is small and needed in every layer, so it stays outside.
        parameters = adapter_parameters(self.module).items()
        return {name: torch.zeros(p.ds_shape, dtype=p.dtype, device=self.device) for name, p in parameters}  # type: ignore[attr-defined]


def _scoring_settings(model: ModelConfig) -> dict[str, bool]:
    return {"checkpointed": model.gradient_checkpointing, "merge_adapter": model.merge_adapter == "auto"}


def _checkpointed(module: nn.Module, model: ModelConfig) -> nn.Module:
    if model.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return module


def _zero_config(model: ModelConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": model.deepspeed.zero_stage}
    if model.deepspeed.offload_parameters != "none":
        offload: dict[str, Any] = {"device": model.deepspeed.offload_parameters}
        if model.deepspeed.nvme_path is not None:
            offload["nvme_path"] = model.deepspeed.nvme_path
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def import_deepspeed(device: str) -> Any:
    """Import DeepSpeed for ``cpu`` or ``cuda``, without compiling any of its operators at run time."""
    os.environ["DS_ACCELERATOR"] = device  # read once, at the import
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its shared-memory collective would be built with the machine's compiler, and nothing here needs it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_in_group(device: str, group: ProcessGroup) -> Any:
    """Import DeepSpeed and join the process group; the place in it travels by environment."""
    if not torch.distributed.is_initialized():
        port = group.port or free_port()
        place = {
            "RANK": group.rank,
            "WORLD_SIZE": group.world_size,
            "LOCAL_RANK": 0,
            "MASTER_ADDR": group.address,
            "MASTER_PORT": port,
        }
        os.environ.update({key: str(value) for key, value in place.items()})
    deepspeed = import_deepspeed(device)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


def check_offload(model: ModelConfig, device: str) -> None:
    """Make sure that this node can do what ``model.deepspeed.offload_parameters`` asks for.

    Raises:
        ResourceError: It cannot; the message has DeepSpeed's reason.
    """
    if model.deepspeed.offload_parameters != "nvme":
        return
    import_deepspeed(device)
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ResourceError(
            "model.deepspeed.offload_parameters: nvme needs DeepSpeed's async_io operator, which cannot be built on "
            f"{socket.gethostname()}: {builder.error_log or 'libaio or a compiler is missing'}. Install libaio's "
            "headers and a compiler, or set cpu."
        )


def free_port() -> int:
    """Return a port that nothing on this machine listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
