"""Checks before anything is spent: files, pairs, base model, template, LoRA targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rose_ray.config.evaluation import EvaluationConfig
from rose_ray.config.job import JobConfig
from rose_ray.config.target import TargetConfig
from rose_ray.data.tokenize import Tokeniser
from rose_ray.distributed.methods import check_methods
from rose_ray.distributed.own_adapters import check_own_adapters, describe_moments
from rose_ray.distributed.spaces import check_sign_vectors, too_wide
from rose_ray.evaluate.inputs import check_inputs
from rose_ray.filesystem import expand, locate
from rose_ray.methods.registry import method_of, needs_of
from rose_ray.model.describe import ModelIdentity, describe_model
from rose_ray.model.tokenizer import load_tokeniser, text_digest
from rose_ray.stages.bank import encode_pairs
from rose_ray.stages.basis_choice import choose_basis
from rose_ray.stages.clean import check_test_text
from rose_ray.stages.ingest import detect_file_format
from rose_ray.stages.target_pairs import read_target_pairs
from rose_ray.stores.workspace import Workspace


def validate_job(config: JobConfig) -> Iterator[str]:
    """Check what a run would need and say what was found, a line each.

    Raises:
        RoseError: The first thing that a run would stumble over.
    """
    Workspace(locate(config.workspace)).check_format()
    for entry in config.pool.inputs:
        for location in expand(entry.files):
            detected = entry.format if entry.format != "auto" else f"{detect_file_format(location)} (detected)"
            yield f"pool file {location.name}: {detected}"
    check_methods(config)
    needs = needs_of(config)
    identity = describe_model(config.model, config.lora) if needs.base_model else None
    if identity is not None:
        yield from _model_lines(config, identity)
    tokeniser = load_tokeniser(config.model)
    if identity is None:
        yield f"tokenizer of {config.model.base}: {text_digest(tokeniser)}; no target needs the model's weights"
    for target in config.targets:
        yield from _target_lines(config, target, tokeniser, identity)
    check_test_text(config)
    if config.evaluation is not None:
        yield from _evaluation_lines(config, config.evaluation)
    yield "valid"


def _evaluation_lines(config: JobConfig, settings: EvaluationConfig) -> Iterator[str]:
    if settings.model is not None or settings.lora is not None:
        model = settings.model or config.model
        yield f"evaluation model {model.base}: {describe_model(model, settings.lora or config.lora).base}"
    for benchmark in check_inputs(config, settings):
        yield f"evaluation {benchmark.name}: {len(benchmark.pairs or benchmark.questions)} items ({benchmark.kind})"


def _model_lines(config: JobConfig, identity: ModelIdentity) -> Iterator[str]:
    yield (
        f"base model {config.model.base}: {identity.base}, {identity.layout.num_parameters:,} adapter parameters in "
        f"{len(identity.layout.shapes)} matrices"
    )
    check_sign_vectors(config, identity.layout)
    if config.gradient_targets and (note := too_wide(config.gradients, identity.layout)) is not None:
        yield note
    states = check_own_adapters(config, identity.layout)
    for name, state in zip(config.warmup.adapters or [], states, strict=True):
        yield f"adapter {name}: {describe_moments(state)}"


def _target_lines(
    config: JobConfig, target: TargetConfig, tokeniser: Tokeniser, identity: ModelIdentity | None
) -> Iterator[str]:
    lacks = target.method == "deita" and target.selection.diversity is None
    filtered = " (selection.diversity, its filter, is not set)" if lacks else ""
    method = "" if target.uses_gradients else f"method {target.method}{filtered}, "
    if method:
        method_of(target).content()  # reads the method's own files and models, which may not be there
    if not target.pairs:
        yield f"target {target.name}: {method}no pairs"
        return
    pairs = read_target_pairs(target)
    counts = Counter(pair.subtask for pair in pairs)
    subtasks = ", ".join(f"{name} {count}" for name, count in counts.items())
    found = f"target {target.name}: {method}{len(pairs)} pairs ({subtasks})"
    if not (target.uses_gradients or method_of(target).needs.base_model):
        yield found  # no run tokenises them
        return
    encoded = encode_pairs(pairs, tokeniser, target)
    cut = sum(1 for pair in encoded if pair.chosen.num_tokens_cut or pair.rejected.num_tokens_cut)
    yield f"{found}, {cut} cut at {tokeniser.max_tokens} tokens"
    if config.is_exact(target) and identity is not None:
        size, number = identity.layout.num_parameters, config.warmup.num_checkpoints
        yield choose_basis(config.gradients, target, pairs, num_parameters=size, num_checkpoints=number).line()
