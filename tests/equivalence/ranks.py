"""Runs DeepSpeed in processes of its own: a process group, once joined, stays with its process.

``run_ranks`` starts the ranks and hands back what each returns; the tasks below are what they run.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 500


def run_ranks(task: str, num_ranks: int, folder: Path, **arguments: Any) -> list[Any]:
    """Run a task of this module on ``num_ranks`` processes and return their results by rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments").write_bytes(pickle.dumps({"num_ranks": num_ranks, "port": port, **arguments}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in range(num_ranks):
        with (folder / f"log-{rank}").open("wb") as log:
            command = [sys.executable, "-m", "tests.equivalence.ranks", task, str(rank), str(folder)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(TIMEOUT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log-{rank}").read_text(errors="replace")[-4000:] for rank in range(num_ranks))
    assert codes == [0] * num_ranks, f"ranks ended with {codes}:\n{logs}"
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(num_ranks)]


def scoring_gradients(
    rank: int, num_ranks: int, port: int, cases: Sequence[Any], batches: Sequence[Sequence[Any]]
) -> list[dict[str, Any]]:
    """Gradients of each case's model over this rank's batches.

    Args:
        rank, num_ranks, port: The place in the process group.
        cases: Model and LoRA settings, adapters and torch dtype of each model, one model after another; without a
            dtype float64, else that of the settings, as users load it. Each adapter in turn goes into the one slot;
            the gradients returned are the last one's.
        batches: Samples of each; rank r takes batches r, r + num_ranks, ... so that ranks stay in step.

    Returns:
        For each case: ``grads`` (number of an own batch -> [B, P]), ``values`` (likewise, [B]), ``references`` (summed
        log-probabilities without the adapter, likewise), ``away``, the number of base parameters of which this rank
        holds no whole copy between passes, and ``calls``, how often an adapted layer ran in the last batch's passes.
    """
    import torch

    from rose_ray.distributed.engine import ProcessGroup, load_scoring_model
    from rose_ray.model.batch import pad_batch
    from rose_ray.model.layout import layout_of
    from tests.oracles import collect, rows_of

    _allow_float64()
    group = ProcessGroup(rank, num_ranks, "127.0.0.1", port)
    results = []
    for model_config, lora, adapters, dtype in cases:
        wide = torch.float64 if dtype is None else None
        model = load_scoring_model(model_config, lora, device="cpu", group=group, dtype=wide)
        names = [name for name, _ in layout_of(model.module).shapes]
        own = {number: pad_batch(batches[number]) for number in range(rank, len(batches), num_ranks)}
        grads, values, references, calls = {}, {}, {}, list[Any]()
        adapted = next(module for module in model.module.modules() if hasattr(module, "lora_A"))
        adapted.register_forward_hook(lambda module, given, made, calls=calls: calls.append(None))
        for adapter in adapters:
            model.load_adapter(adapter)
            for number, batch in own.items():
                with torch.no_grad(), model.without_adapter():
                    references[number] = model.sample_values(batch, "sum_logps").numpy()
                kept, consume = collect(names)
                calls.clear()
                values[number] = model.backward_per_sample(batch, "mean_loss", consume).numpy()
                grads[number] = rows_of(kept).numpy()
        away = sum(p.numel() == 0 for name, p in model.module.named_parameters() if "lora_" not in name)
        results.append({"grads": grads, "values": values, "references": references, "away": away, "calls": len(calls)})
    return results


def load_in_parts(rank: int, num_ranks: int, port: int, model: Any, others: Sequence[Any]) -> dict[str, Any]:
    """A base model loaded under ZeRO stage 3, and compared with its own files and with those of ``others``.

    Returns:
        ``held``: numbers of base parameters that this rank holds, ``whole``: numbers of the model; ``same_linear``:
        torch's linear function is what it was; ``said``: what was raised for each of the others.
    """
    import torch

    from rose_ray.distributed.engine import ProcessGroup, deepspeed_in_group
    from rose_ray.distributed.partitioned import check_weights, load_partitioned
    from rose_ray.errors import ModelError

    linear = torch.nn.functional.linear
    deepspeed = deepspeed_in_group("cpu", ProcessGroup(rank, num_ranks, "127.0.0.1", port))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    base = load_partitioned(model, config, deepspeed)
    parameters: list[Any] = list(base.parameters())
    said = []
    for other in others:
        try:
            check_weights(base, other, deepspeed)
        except ModelError as error:
            said.append(str(error))
    return {
        "held": sum(p.numel() + p.ds_tensor.numel() for p in parameters),
        "whole": sum(p.ds_numel for p in parameters),
        "same_linear": torch.nn.functional.linear is linear,
        "said": said,
    }


def _allow_float64() -> None:
    """Make DeepSpeed's stage 3 take float64 on every CPU.

    On those that compute in float16 it checks the type that it would give to parameters of its own making, and refuses
    float64; on others it takes bfloat16 for that, whatever it is told. It makes none here: they come with the model.
    """
    from rose_ray.distributed.engine import import_deepspeed

    import_deepspeed("cpu").get_accelerator().is_fp16_supported = lambda: False


def warm_up(
    rank: int,
    num_ranks: int,
    port: int,
    jobs: Sequence[Any],
    probe: Any,
    interrupted: Sequence[tuple[Any, Any]] = (),
    num_updates: int = 0,
    left: Sequence[Any] = (),
) -> list[dict[str, Any]]:
    """Warm-ups one after another, as Ray Train's workers run them.

    Args:
        rank, num_ranks, port: The place in the process group.
        jobs: Trained at a stretch, or from where others left them.
        probe: Token ids.
        interrupted: Equal jobs but for their folders: one is trained at a stretch, the other by workers that vanish
            after ``num_updates`` steps and by others that go on.
        num_updates: See there.
        left: Trained by workers that vanish likewise, and left to others.

    Returns:
        For each job: ``epochs``, what each of them reported, and ``logits``, of the trained model for ``probe``. Then
        for each pair: ``whole`` and ``cut``, the reports of each, and ``resumed_at``, the steps that were found saved.
    """
    import torch

    from rose_ray.distributed.training import WarmupTrainer

    place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.distributed.init_process_group("gloo")
    results = []
    for job in jobs:
        trainer = WarmupTrainer(job, rank=rank, num_workers=num_ranks)
        while len(trainer.epochs) < job.warmup.epochs:
            trainer.train_epoch()
        trainer.model.eval()
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([probe])).logits
        results.append({"epochs": trainer.epochs, "logits": logits.float().numpy()})
    for whole, cut in interrupted:
        _vanishing(cut, num_updates, rank, num_ranks)
        unbroken, later = (WarmupTrainer(job, rank=rank, num_workers=num_ranks) for job in (whole, cut))
        resumed_at = later.num_updates
        for trainer in (unbroken, later):
            while len(trainer.epochs) < whole.warmup.epochs:
                trainer.train_epoch()
        results.append({"whole": unbroken.epochs, "cut": later.epochs, "resumed_at": resumed_at})
    for job in left:
        _vanishing(job, num_updates, rank, num_ranks)
    return results


def _vanishing(job: Any, num_updates: int, rank: int, num_ranks: int) -> None:
    """Train as workers do that vanish after so many updates, among them the first epoch's."""
    from rose_ray.distributed.training import WarmupTrainer

    class VanishedError(Exception):
        pass

    class Vanishing(WarmupTrainer):
        def step(self, step: Any) -> float:
            if self.num_updates == num_updates:
                raise VanishedError
            return super().step(step)

    trainer = Vanishing(job, rank=rank, num_workers=num_ranks)
    with suppress(VanishedError):
        for _ in range(job.warmup.epochs):
            trainer.train_epoch()


def save_deepspeed(rank: int, num_ranks: int, port: int, base: str, lora: Any, cases: Any) -> list[dict[str, Any]]:
    """Short trainings that DeepSpeed saves: ``cases`` are (folder, its configuration) each.

    Returns:
        For each case: ``weight``, ``exp_avg`` and ``exp_avg_sq`` by parameter name as DeepSpeed itself hands them out,
        numpy, float32; ``step``, the number that Adam itself has come to.
    """
    import torch

    from rose_ray.distributed.engine import import_deepspeed
    from tests import oracles

    deepspeed = import_deepspeed("cpu")
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    results = []
    for folder, config in cases:
        torch.manual_seed(1)
        model = oracles.peft_model(base, **lora, dtype=torch.float32).train()
        named = oracles.trainable(model)
        adam = torch.optim.AdamW(named.values(), lr=3e-3, betas=(0.8, 0.95), eps=1e-7)
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **config}
        engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings)
        for step in range(3):
            ids = torch.tensor([[5 + step, 17, 40 + rank, 9]])
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(folder)
        if rank == 0:
            engine.module.peft_config["default"].save_pretrained(folder)
        whole: dict[str, Any] = {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, p in named.items():
            if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
                found = [
                    safe_get_full_fp32_param(p),
                    *(safe_get_full_optimizer_state(p, key) for key in list(whole)[1:]),
                ]
            else:
                master = adam.param_groups[0]["params"][list(named).index(name)]  # a float32 copy beside bfloat16
                found = [master, *(adam.state[master][key] for key in list(whole)[1:])]
            for key, tensor in zip(whole, found, strict=True):
                whole[key][name] = tensor.detach().float().numpy().copy()
        results.append({**whole, "step": {int(entry["step"]) for entry in adam.state.values()}})
    return results


def main(task: str, rank: str, folder: str) -> None:
    """What each process runs."""
    import torch

    torch.set_num_threads(1)
    arguments = pickle.loads((Path(folder) / "arguments").read_bytes())
    result = globals()[task](rank=int(rank), **arguments)
    (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
