"""The command that compares methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drtune_ray.cli.options import echo, json_option, of_study, quiet_option

if TYPE_CHECKING:
    from drtune_ray.config.study import StudyConfig
    from drtune_ray.display.outputs import Quiet
    from drtune_ray.study.comparison_plan import Comparison
    from drtune_ray.study.folds_plan import FoldedComparison
    from drtune_ray.study.result import StudyPlan, StudyResult


MAX_FOLDS = 100  # and repeats


@click.command()
@of_study
@click.option(
    "--methods",
    required=True,
    metavar="LIST",
    help="Methods, separated by commas, ce_tuning among them; NAME=METHOD names one. `ablation` "
    "stands for CE-tuning and the parts of DR-Tune.",
)
@click.option(
    "--method-space",
    "spaces",
    multiple=True,
    metavar="NAME=SPACE",
    help="Search space of a method. Default: the shipped space of its name. May be repeated.",
)
@click.option(
    "--shares",
    metavar="LIST",
    help="Compare with each of these shares of the training images, such as 0.1,0.25,0.5,1.",
)
@click.option(
    "--folds",
    type=click.IntRange(2, MAX_FOLDS),
    help="Compare by cross-validation with this many folds, for small sets.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1, MAX_FOLDS),
    help="Number of times that the images are divided into folds.  [default: 1]",
)
@click.option("--preview", "is_preview", is_flag=True, help="Estimate the hours, and run nothing.")
@click.option("--again", is_flag=True, help="Open the test split although it was opened before.")
@quiet_option
@json_option
def compare(
    study_file: Path | None,
    assignments: tuple[str, ...],
    methods: str,
    spaces: tuple[str, ...],
    shares: str | None,
    folds: int | None,
    repeats: int | None,
    is_preview: bool,
    again: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compare methods on your images, each with the same budget.

    Every method gets a search of its own; its best configurations run again on fresh seeds, and
    the sealed test split is opened once for all of them (docs/compare.md). The same command
    resumes, or shows the result.
    """
    from rich.console import Console

    from drtune_ray.config.sources import mapping_of, merged_study
    from drtune_ray.display.outputs import JsonLines, People, Quiet, is_live, json_stdout
    from drtune_ray.study.resolve import study_request

    console = Console(highlight=False)
    with json_stdout(is_wanted=as_json) as stream:
        people = (
            JsonLines(stream) if as_json else People(console, is_live=is_live(console, os.environ))
        )
        output = Quiet() if quiet else people
        # CE-tuning is one of the methods: no search needs reference trials.
        assignments = (*assignments, "reference_trials=[]")
        config, notes = study_request(study_file, assignments, flags)
        finals = mapping_of(merged_study(study_file, assignments, flags), "finalists")
        comparison = _planned(
            config, methods, spaces, shares, folds, repeats, has_seeds="num_seeds" in finals
        )
        for note in notes:
            output.say(note)
        if is_preview:
            _preview(comparison, stream, as_json)
        else:
            _run(comparison, output, stream, again, as_json)


def _planned(
    config: StudyConfig,
    methods: str,
    spaces: tuple[str, ...],
    shares: str | None,
    folds: int | None,
    repeats: int | None,
    *,
    has_seeds: bool,
) -> Comparison | FoldedComparison:
    from drtune_ray.errors import ConfigError

    if folds is None:
        from drtune_ray.study.comparison_plan import planned

        if repeats is not None:
            raise ConfigError(f"--repeats={repeats} needs --folds: add it, or leave out --repeats")
        return planned(config, methods, spaces, shares=shares, has_seeds=has_seeds)
    from drtune_ray.study.folds_plan import planned_folds

    if shares is not None:
        raise ConfigError(f"--shares={shares} cannot be used with --folds={folds}: leave one out")
    return planned_folds(
        config, methods, spaces, folds=folds, repeats=repeats or 1, has_seeds=has_seeds
    )


def _preview(comparison: Comparison | FoldedComparison, stream: Any, as_json: bool) -> None:
    from drtune_ray.display.comparison import previewed_facts, previewed_lines
    from drtune_ray.display.outputs import write_json
    from drtune_ray.preview.estimate import preview_study  # only now: it imports torch and Ray

    previews = [preview_study(study) for study in comparison.parts[0].studies.values()]
    if as_json:
        write_json(stream, "preview", previewed_facts(comparison, previews))
    else:
        echo(previewed_lines(comparison, previews))


def _run(
    comparison: Comparison | FoldedComparison,
    output: Quiet,
    stream: Any,
    again: bool,
    as_json: bool,
) -> None:
    from drtune_ray.display.comparison import (
        comparison_facts,
        comparison_lines,
        comparison_plan_lines,
    )
    from drtune_ray.display.outputs import write_json
    from drtune_ray.display.result import plan_lines
    from drtune_ray.display.script import run_shown  # only now: it imports torch and Ray
    from drtune_ray.study.comparison import run_comparison
    from drtune_ray.study.comparison_folds import run_folds
    from drtune_ray.study.folds_plan import FoldedComparison
    from drtune_ray.study.status import write_command

    num_studies = sum(len(part.studies) for part in comparison.parts)

    def announce(plan: StudyPlan) -> None:
        write_command(plan.config.folder)
        if not as_json:
            for line in plan_lines(plan):
                output.say(line)

    def run(study: StudyConfig, tags: Mapping[str, str]) -> StudyResult:
        return run_shown(study, output, on_plan=announce, tags=tags)

    def say(study: str, number: int) -> None:
        output.say(f"Study {number} of {num_studies}: {study!r}")

    if not as_json:
        for line in comparison_plan_lines(comparison):
            output.say(line)
    if isinstance(comparison, FoldedComparison):
        result = run_folds(comparison, run, again=again, on_method=say)
    else:
        result = run_comparison(comparison, run, again=again, on_method=say)
    if as_json:
        write_json(stream, "result", comparison_facts(result))
    else:
        echo(comparison_lines(result))
