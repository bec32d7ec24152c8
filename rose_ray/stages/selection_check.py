"""What a selection asks for against what the pool holds, before anything is computed for it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from decimal import Decimal

from rose_ray.config.job import JobConfig
from rose_ray.config.selection import SelectionConfig
from rose_ray.errors import ConfigError
from rose_ray.kernels.budget import Budget, budget_count

_NUM_LISTED = 20


def check_selections(config: JobConfig, sources: Mapping[str, int]) -> None:
    """Refuse selections that this pool cannot give, whatever the scores will be.

    Args:
        config: Its targets and ``training_set``.
        sources: Unique rows of the pool by source.

    Raises:
        ConfigError: A selection names a source that the pool lacks, or asks for more rows than it may choose from, or
            for more tokens than these can have.
    """
    longest = config.model.max_tokens
    for number, target in enumerate(config.targets):
        check_selection(f"targets.{number}.selection ({target.name})", target.selection, sources, longest)
    if config.training_set is not None:
        check_selection("training_set.selection", config.training_set.selection, sources, longest)


def check_selection(
    key: str, selection: SelectionConfig, sources: Mapping[str, int], max_tokens: int | None = None
) -> None:
    """Refuse one selection that this pool cannot give.

    Args:
        key: Names it in messages.
        selection: What is asked for.
        sources: Unique rows of the pool by source.
        max_tokens: Of a row at most; None leaves a selection by tokens unchecked.

    Raises:
        ConfigError: As `check_selections`.
    """
    named = {
        "include_sources": selection.include_sources or [],
        "exclude_sources": selection.exclude_sources,
        "source_quotas": list(selection.source_quotas),
    }
    for field, names in named.items():
        for name in names:
            if name not in sources:
                near = difflib.get_close_matches(name, list(sources), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {sorted(sources)[:_NUM_LISTED]}"
                raise ConfigError(f"{key}.{field}: the pool has no source {name!r}; {hint}")
    kind, amount = selection.budget
    if kind == "tokens" and max_tokens is None:
        return
    total = sum(sources.values())
    wanted = budget_count(Budget(fraction=amount), total) if kind == "fraction" else int(amount)
    assert wanted is not None
    # How many tokens a row has is known once it is read; until then it may have as many as any.
    unit, each = ("tokens", max_tokens or 0) if kind == "tokens" else ("rows", 1)
    allowed = {
        name: num_rows
        for name, num_rows in sources.items()
        if name in (selection.include_sources or sources) and name not in selection.exclude_sources
    }
    quotas = {name: int(Decimal(str(share)) * wanted) for name, share in selection.source_quotas.items()}
    within = sum(min(num_rows * each, quotas.get(name, wanted)) for name, num_rows in allowed.items())
    limit = f", none of more than model.max_tokens: {max_tokens:,} tokens" if kind == "tokens" else ""
    if wanted > within:
        raise ConfigError(
            f"{key}.{kind}: {wanted:,} {unit} asked for, but at most {within:,} can be selected: the pool has "
            f"{total:,} unique rows, {sum(allowed.values()):,} of them in allowed sources{limit}, and quotas leave "
            f"{within:,}. Ask for less or loosen the source rules."
        )
