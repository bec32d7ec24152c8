"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rose_ray.stages.plan import Plan, PoolTokens, Rates, Work

_BAR = 40
"""Characters of the longest bar of the histogram."""


def plan_lines(
    tokens: PoolTokens,
    work: Work,
    rates: Rates | None,
    plan: Plan,
    num_shards: int,
    others: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The whole report. ``others``: targets that are not foretold, with the method that scores them."""
    yield from _token_lines(tokens, num_shards)
    for target, method in (others or {}).items():
        yield f"target {target}: method {method} is not foretold"
    if work.row_states:
        states = " and ".join(work.row_states)
        yield f"selection.diversity: states {states} of the base model, a forward pass for every row, are not foretold"
    if others and not work.num_pairs:
        yield "no target is scored by gradients: no warm-up, no bank, no features"
        return
    yield from _work_lines(work, num_shards)
    yield from work.basis_lines
    yield from _size_lines(plan)
    if rates is None:
        yield from _rank_lines(work) if work.ranks > 1 else ()
        yield f"no probe: no times{'' if work.ranks > 1 else ' and no memory'}"
        return
    yield from _memory_lines(rates, "rank" if work.ranks > 1 else "actor")
    yield from _time_lines(work, plan, list(others or {}))


def _token_lines(tokens: PoolTokens, num_shards: int) -> Iterator[str]:
    """Rows, shards, and the histogram of lengths."""
    sampled = tokens.num_sampled
    yield f"pool: {tokens.num_rows:,} unique rows in {num_shards:,} shards"
    if not tokens.lengths:
        yield f"none of {sampled:,} sampled rows makes a sample"
        return
    which = "all" if sampled == tokens.num_rows else f"{sampled:,} sampled"
    yield (
        f"tokens: {tokens.num_tokens:,} at one checkpoint, {tokens.num_tokens / tokens.num_scored:,.0f} a row "
        f"({which} rows: {tokens.num_rejected:,} rejected, {tokens.num_cut:,} cut)"
    )
    histogram = tokens.histogram()
    width, most = max(len(name) for name, _ in histogram), max(share for _, share in histogram)
    for name, share in histogram:
        yield f"  {name:>{width}}  {share:>6.1%}  {'#' * round(_BAR * share / most)}".rstrip()


def _work_lines(work: Work, num_shards: int) -> Iterator[str]:
    """What is done and what is left."""
    left = len(work.shard_rows)
    bases = f"exact bases of {len(work.basis_tokens)}; " if work.basis_tokens else ""
    yield (
        f"to do: warm-up {'yes' if work.warmup_positions else 'no'}; {bases}banks of {len(work.pair_tokens)} of "
        f"{len(work.num_pairs)} targets; features of {left:,} of {num_shards:,} shards, "
        f"{sum(work.shard_rows):,} rows x {work.num_checkpoints} checkpoints"
    )


def _time_lines(work: Work, plan: Plan, others: Sequence[str]) -> Iterator[str]:
    """Seconds and device hours by stage, and when selecting pays for itself; ``others`` are not foretold."""
    device = "GPU" if work.gpus else "rank" if work.ranks > 1 else "actor"
    width = max((len(stage) for stage in plan.seconds), default=5)
    yield f"{'stage':<{width}}   wall time  {device}-hours"
    for stage, seconds in plan.seconds.items():
        hours = plan.device_hours.get(stage)
        yield f"{stage:<{width}}  {duration(seconds):>10}  {'' if hours is None else f'{hours:>10,.3g}'}".rstrip()
    total = sum(plan.device_hours.values())
    left_out = "without select" + (f" and without what scores {', '.join(others)}" if others else "")
    yield f"{'in all':<{width}}  {duration(plan.wall_seconds):>10}  {total:>10,.3g}  {left_out}"
    if plan.training_hours is not None and plan.break_even_epochs is not None:
        whole, part = plan.training_hours
        yield (
            f"training this adapter for an epoch: {whole:,.3g} {device}-hours on all rows, {part:,.3g} on "
            f"{work.fraction:.1%} of them; selecting pays for itself after {plan.break_even_epochs:,.2g} epochs"
        )


def _size_lines(plan: Plan) -> Iterator[str]:
    """Bytes of each kind of artefact."""
    yield "sizes, before compression: " + ", ".join(f"{name} {_bytes(size)}" for name, size in plan.num_bytes.items())


def _memory_lines(rates: Rates, whose: str) -> Iterator[str]:
    """Peak memory of an actor or a rank, on its device and beside it, and whether it fits."""
    of = {"actor": "an actor", "rank": "a rank"}[whose]
    fits = rates.peak_bytes <= rates.available_bytes
    yield (
        f"memory of {of}: {_bytes(rates.peak_bytes)} at batches of {rates.max_batch_tokens:,} tokens, "
        f"{_bytes(rates.available_bytes)} available: {_verdict(fits)}"
    )
    if not fits:
        room = {"actor": "ray.gpus_per_actor or model.deepspeed", "rank": "ray.ranks_per_actor"}[whose]
        yield f"lower gradients.max_batch_tokens or model.max_tokens, or raise {room}"
    if rates.host_bytes:
        fits = rates.host_bytes <= rates.host_available_bytes
        yield (
            f"host memory of {of}: {_bytes(rates.host_bytes)}, its checkpoints among it, "
            f"{_bytes(rates.host_available_bytes)} available: {_verdict(fits)}"
        )
        if not fits:
            yield f"let fewer {whose}s share a machine: raise ray.cpus_per_actor, or add machines; or lower lora.rank"


def _verdict(fits: bool) -> str:
    return "fits" if fits else "DOES NOT FIT"


def _rank_lines(work: Work) -> Iterator[str]:
    """Least memory of each of the ranks that share a model."""
    part = -(-work.base_bytes // work.ranks)
    yield (
        f"memory of a rank: at least {_bytes(part + work.largest_bytes)} for weights ({_bytes(part)} its part of the "
        f"base's {_bytes(work.base_bytes)}, {_bytes(work.largest_bytes)} the largest parameter, gathered), and "
        f"{_bytes(work.held_bytes)} of host memory for checkpoints; what batches take comes on top"
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
