"""Is a target fit to be selected for: its pairs, its direction, and what the direction foretells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rose_ray.cli.app import Config, Set, Target, app, reported

if TYPE_CHECKING:
    from rose_ray.config.job import JobConfig
    from rose_ray.stores.workspace import Workspace

Json = Annotated[str | None, typer.Option("--json", help="Write everything as JSON to this file too.")]


@app.command()
@reported
def doctor(
    config: Config,
    test: Annotated[
        list[str] | None,
        typer.Option("--test", help="Files of test texts, in place of the configuration's."),
    ] = None,
    test_field: Annotated[
        list[str] | None,
        typer.Option("--test-field", help="Key whose text counts in those files; known keys if unset."),
    ] = None,
    test_split: Annotated[str | None, typer.Option("--test-split", help="Take rows of this split alone.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if more than notes is found.")] = False,
    json_file: Json = None,
    similar: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sides are near-identical from this share of equal words on.")
    ] = 0.9,
    subtask_pairs: Annotated[int, typer.Option(min=1, help="Fewest pairs of a subtask.")] = 3,
    overrides: Set = None,
) -> None:
    """Look for what is wrong with the targets' pairs: by their texts, and by the bank and pool where there are some."""
    loaded = _loaded(config, overrides)
    from rose_ray.errors import ConfigError, PairError
    from rose_ray.filesystem import expand
    from rose_ray.stages.diagnose.configured_tests import ConfiguredTests, configured_tests
    from rose_ray.stages.diagnose.doctor import examine
    from rose_ray.stages.diagnose.findings import report_lines
    from rose_ray.stages.diagnose.overlap import read_evaluation_texts
    from rose_ray.stages.diagnose.pair_texts import TextLimits
    from rose_ray.stages.target_pairs import read_target_pairs

    if not test and (test_field or test_split):
        raise ConfigError("--test-field and --test-split say what of the files of --test is read: name some.")
    pairs: dict[str, Any] = {}
    for target in loaded.targets:
        try:
            pairs[target.name] = read_target_pairs(target, checked=False)
        except PairError as error:
            pairs[target.name] = error
    if test:
        known = read_evaluation_texts(expand(test), fields=test_field, split=test_split)
        tests = ConfiguredTests(known, {"--test": len(known.names)}, {})
    else:
        tests = configured_tests(loaded)
        for line in tests.lines():
            typer.echo(line)
    limits = TextLimits(similarity=similar, subtask_pairs=subtask_pairs)
    reports = []
    for number, report in enumerate(examine(_workspace_if_any(loaded), loaded, pairs, tests.known, limits)):
        reports.append(report)
        for line in [*([""] if number else []), *report_lines(report)]:
            typer.echo(line)
    told = {"test_texts": tests.counts, "test_texts_unread": tests.unread}
    _write_json(json_file, {**told, "targets": [report.as_json() for report in reports]})
    if strict and not all(report.is_healthy for report in reports):
        raise typer.Exit(1)


def _workspace_if_any(config: JobConfig) -> Workspace | None:
    from rose_ray.filesystem import locate
    from rose_ray.stores.workspace import Workspace

    workspace = Workspace(locate(config.workspace))
    return workspace if workspace.check_format() else None


def _write_json(path: str | None, content: dict[str, Any]) -> None:
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
        typer.echo(f"wrote {path}")


@app.command()
@reported
def shots(
    config: Config,
    target: Target,
    draws: Annotated[int, typer.Option(min=2, help="Random draws for each number of shots.")] = 50,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least lower end of the Jaccard index of a stable selection.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    json_file: Json = None,
    overrides: Set = None,
) -> None:
    """Say how far the selection hangs on which pairs there are: fewer, one left out, labels flipped. No model runs."""
    loaded = _loaded(config, overrides)
    from rose_ray.stages.diagnose.pool_scores import PoolScores, stored_pool
    from rose_ray.stages.diagnose.shots import DrawSettings, shots_lines, shots_report
    from rose_ray.stages.diagnose.stored import needed_bank, target_named
    from rose_ray.stages.target_pairs import read_target_shots
    from rose_ray.stores.workspace import Workspace

    chosen = target_named(loaded, target)
    workspace = Workspace.open(loaded.workspace)
    own, shots_of_own = read_target_shots(chosen)
    bank = needed_bank(workspace, loaded, chosen, own)
    pool, features_key = stored_pool(workspace, bank)
    with PoolScores(bank.atoms(), chosen, pool.counts["unique"]) as scores:
        scores.read(workspace, pool, features_key, bank.checkpoints)
        settings = DrawSettings(draws, threshold, seed)
        report = shots_report(scores, shots_of_own, settings)
    for line in shots_lines(report):
        typer.echo(line)
    _write_json(json_file, report.as_json())


def _loaded(config: str, overrides: list[str] | None) -> JobConfig:
    from rose_ray.config import load_config

    return load_config(config, overrides or [])


@app.command()
@reported
def alignment(
    config: Config,
    target: Target,
    held_out: Annotated[
        list[str], typer.Option("--held-out", help="Files of held-out pairs, or SUBTASK=FILES; once or more.")
    ],
    pairs: Annotated[int | None, typer.Option(min=1, help="Take so many of every subtask; all if unset.")] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Of the held-out pairs, for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    json_file: Json = None,
    overrides: Set = None,
) -> None:
    """Compare a target's direction with that of held-out pairs; computes their bank where there is none."""
    loaded = _loaded(config, overrides)
    from rose_ray.distributed.alignment import held_out_banks
    from rose_ray.stages.diagnose.alignment import alignment_lines, alignments, check_apart, held_out_target
    from rose_ray.stages.diagnose.stored import target_named
    from rose_ray.stages.target_pairs import read_target_pairs

    chosen = target_named(loaded, target)
    other = held_out_target(loaded, chosen, held_out, pairs)
    own, apart = read_target_pairs(chosen), read_target_pairs(other)
    check_apart(chosen, own, apart)
    banks = held_out_banks(loaded, (chosen, other), (own, apart))
    report = alignments(*banks, num_resamples=resamples, seed=seed)
    for line in alignment_lines(report):
        typer.echo(line)
    _write_json(json_file, report.as_json())


@app.command("reward-step")
@reported
def reward_step(
    config: Config,
    target: Target,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the pool, drawn at random.")] = 16,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of the target, drawn at random.")] = 4,
    step: Annotated[float, typer.Option(help="Length of the short step over the adapter's own.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    json_file: Json = None,
    overrides: Set = None,
) -> None:
    """Take training steps on a few rows and set the margins' changes beside what the influences foretell."""
    loaded = _loaded(config, overrides)
    from rose_ray.distributed.reward_step import reward_step as measure
    from rose_ray.errors import ConfigError
    from rose_ray.stages.diagnose.reward_step import reward_step_lines
    from rose_ray.stages.diagnose.stored import target_named
    from rose_ray.stages.target_pairs import read_target_pairs

    if not 0 < step < 1:
        raise ConfigError(f"--step {step}: expected a share above 0 and below 1 of the adapter's length.")
    chosen = target_named(loaded, target)
    own = read_target_pairs(chosen)
    report = measure(loaded, chosen, own, num_rows=rows, num_pairs=pairs, share=step, seed=seed)
    for line in reward_step_lines(report):
        typer.echo(line)
    _write_json(json_file, report.as_json())
