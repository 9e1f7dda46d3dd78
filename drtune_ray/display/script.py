"""Studies with their progress shown: from the command line, and from scripts and notebooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from rich.console import Console

from drtune_ray.config.study import StudyConfig
from drtune_ray.display.outputs import People, Quiet
from drtune_ray.display.progress import StudyProgress
from drtune_ray.display.result import plan_facts, plan_lines
from drtune_ray.study import run as study
from drtune_ray.study.result import StudyPlan, StudyResult
from drtune_ray.study.status import read_trials
from drtune_ray.tracking.events import Sink, fan_out


def run_study(
    config: StudyConfig, *, progress: bool = True, observer: Sink | None = None
) -> StudyResult:
    """Run a study, or resume it, and choose the winner; the same call shows a finished one.

    Everything is checked before the first trial. If a study of this name exists, its unfinished
    trials are resumed first, then new ones follow up to ``config.trials``.

    Args:
        config: The study.
        progress: Print the plan, a line per trial and a summary each minute, on stderr; False
            prints warnings only.
        observer: Takes the events of the run as they happen; see `drtune_ray.tracking.events`.

    Raises:
        ConfigError: If the input is invalid, or the name belongs to another configuration.
        EnvironmentProblem: If the machine cannot run a trial or another process drives the study.
        NoTrialCompleted: If all trials ran and none completed.
        KeyboardInterrupt: If interrupted; the same call resumes the study.
    """
    console = Console(file=sys.stderr, highlight=False, force_jupyter=False)
    output = People(console, is_live=False) if progress else Quiet()

    def announce(plan: StudyPlan) -> None:
        for line in plan_lines(plan):
            output.say(line)

    result = run_shown(config, output, on_plan=announce, observer=observer)
    output.say(f"Done: {result!r}")
    return result


def run_shown(
    config: StudyConfig,
    output: Quiet,
    *,
    on_plan: Callable[[StudyPlan], None],
    observer: Sink | None = None,
    tags: Mapping[str, str] | None = None,
) -> StudyResult:
    """Run a study with an output that follows its trials.

    Args:
        config: The study.
        output: Receives the progress; closed at the end.
        on_plan: Called with each part's plan before the output shows its progress.
        observer: Takes the events besides the output.
        tags: Further tags of its run in MLflow.
    """

    def announce(plan: StudyPlan) -> None:
        on_plan(plan)
        earlier = plan.of_part(read_trials(plan.config.folder))
        epochs = plan.config.trial.training.last_epoch
        progress = StudyProgress(plan.num_trials, plan.num_done, epochs, plan.searched, earlier)
        output.plan(progress, plan_facts(plan))

    try:
        return study.run_study(
            config,
            observer=fan_out(output.take, observer) if observer else output.take,
            on_plan=announce,
            on_notice=output.notice,
            tags=tags,
        )
    finally:
        output.close()
