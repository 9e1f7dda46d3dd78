"""The command line: parse, call one function, print.

Heavy imports stand inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from drtune_ray import __version__
from drtune_ray.cli_deploy import deploy
from drtune_ray.errors import ConfigError, DrtuneError

if TYPE_CHECKING:
    from drtune_ray.config import StudyConfig
    from drtune_ray.display.output import Quiet
    from drtune_ray.search.outlook import StudyPlan

DEFAULT_STORAGE = "./drtune-studies"
INTERRUPTED = 130

_storage = click.option(
    "--storage", default=DEFAULT_STORAGE, show_default=True, help="Folder for everything written."
)
_set = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a setting of the trial, like --set training.epochs=20.",
)
_data = click.option("--data", "data_folder", help="Folder with one folder of images a class.")
_backbone = click.option("--backbone", help="A timm model.")
_weights = click.option("--weights", help="A file, 'timm' (its hub) or 'demo' (packaged).")
_epochs = click.option("--epochs", type=int, help="Epochs of a trial.")
_image_size = click.option("--image-size", type=int, help="Side of the images in pixels.")
_seed = click.option("--seed", type=int, help="Of everything that is drawn.")
_name = click.option(
    "--name", help="Of its folder; by default the data folder's (for train with -train)."
)
_tracking_uri = click.option(
    "--tracking-uri", help="MLflow server; by default SQLite under the storage."
)
_artifacts = click.option(
    "--artifacts",
    help="s3://, gs:// or file:// URI for what the next driver and other nodes need.",
)
_quiet = click.option(
    "--quiet", is_flag=True, help="The result and warnings only; with --json: the result only."
)
_json = click.option(
    "--json", "as_json", is_flag=True, help="JSON lines on stdout, one an event (docs/json.md)."
)


_STUDY_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.argument("study_file", required=False, type=click.Path(path_type=Path)),
    _data,
    _backbone,
    _weights,
    click.option("--trials", type=int, help="How many, the reference trials included."),
    _epochs,
    _image_size,
    click.option("--space", help="A shipped search space (quick, dr_tune, ...) or a YAML file."),
    click.option("--storage", help=f"Folder for everything written.  [default: {DEFAULT_STORAGE}]"),
    _name,
    _seed,
    click.option("--workers", type=int, help="Ray Train workers of a trial."),
    click.option("--sampler", help="tpe, gp, cma_es, qmc, random, nsga2 or nsga3."),
    click.option("--scheduler", help="Early stopping: asha, median or none."),
    click.option("--finalist-seeds", type=int, help="New seeds for the finalists; 0: no finals."),
    click.option(
        "--warm-start",
        multiple=True,
        metavar="STUDY",
        help="A study whose trials the sampler learns from, by name or folder.",
    ),
    _tracking_uri,
    click.option("--optuna-storage", help="URL of a database; by default a file in the study."),
    _artifacts,
    _set,
)


def _of_study(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that say which study: those of tune, and of what looks ahead to it."""
    for option in reversed(_STUDY_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Find the best DR-Tune fine-tuning of a pretrained vision model for your images."""


@cli.command()
@_storage
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything drawn.")
@_quiet
@_json
def demo(storage: str, seed: int, quiet: bool, as_json: bool) -> None:
    """Run a small real study, start to end.

    Ctrl-C and going on: see tune.
    """
    from drtune_ray.demo import demo_config

    _run_study(lambda: (demo_config(_resolved(storage), seed), []), quiet, as_json)


@cli.command()
@_of_study
@_quiet
@_json
def tune(
    study_file: Path | None,
    assignments: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Search; the same command resumes, or shows the result.

    Ctrl-C (or SIGTERM) has the running trials save at their next step and ends with code 130;
    the same command goes on there. A second Ctrl-C does not wait: the same command goes on from
    the saves that there are, of the last epoch or of training.save_every_seconds.
    """
    from drtune_ray.search.request import study_request

    _run_study(lambda: study_request(study_file, assignments, flags), quiet, as_json)


@cli.command()
@_of_study
@_json
def preview(
    study_file: Path | None, assignments: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Say what a study will cost; takes what tune takes, and about a minute.

    Trains for seconds on some of the images; nothing is written under the storage.
    """
    from drtune_ray.display.foresight import preview_facts, preview_lines
    from drtune_ray.display.output import json_stdout, write_json
    from drtune_ray.search.preview import preview_study
    from drtune_ray.search.request import study_request

    with json_stdout(is_wanted=as_json) as stream:
        config, notes = study_request(study_file, assignments, flags)
        if not as_json:
            _echo(notes)
        found = preview_study(config)
        if as_json:
            write_json(stream, "preview", preview_facts(found))
        else:
            _echo(preview_lines(found))


@cli.command()
@click.argument("trial_file", required=False, type=click.Path(path_type=Path))
@_data
@_backbone
@_weights
@_epochs
@_image_size
@click.option("--preset", help="default, paper or authors.")
@click.option("--workers", type=int, help="Ray Train workers.")
@_storage
@_name
@_seed
@_tracking_uri
@_artifacts
@_set
@_quiet
@_json
def train(
    trial_file: Path | None,
    assignments: tuple[str, ...],
    storage: str,
    name: str | None,
    tracking_uri: str | None,
    artifacts: str | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train one configuration on Ray Train; the same command resumes, or shows the result."""
    from drtune_ray.display.outcome import training_facts, training_lines
    from drtune_ray.display.output import TrainingLines, json_stdout, write_json
    from drtune_ray.search.request import default_name, trial_request
    from drtune_ray.search.single import run_training
    from drtune_ray.search.status import write_command
    from drtune_ray.section import validated
    from drtune_ray.study_sections import TrackingConfig
    from drtune_ray.tracking.events import Event, RunStarted

    with json_stdout(is_wanted=as_json) as stream:
        config, resources, notes = trial_request(trial_file, assignments, flags)
        output = _output(stream, quiet, as_json, TrainingLines(config.training.epochs))
        for note in notes:
            output.say(note)
        name = name or f"{default_name(config)}-train"
        folder = _resolved(storage) / name

        def observe(event: Event) -> None:
            if isinstance(event, RunStarted):
                write_command(folder)
            output.take(event)

        result = run_training(
            config,
            name,
            Path(storage),
            resources=resources,
            tracking=validated(TrackingConfig, {"uri": tracking_uri}),
            artifacts=artifacts,
            observer=observe,
            on_notice=output.notice,
        )
        if as_json:
            write_json(stream, "result", training_facts(result))
        else:
            _echo(training_lines(result, _program()))


@cli.command()
@click.argument("study")
@_storage
@click.option("--again", is_flag=True, help="Open a test split that was opened before.")
def evaluate(study: str, storage: str, again: bool) -> None:
    """Test the winner on the sealed test split."""
    from drtune_ray.display import percent
    from drtune_ray.search.outcome import evaluate_study

    found = evaluate_study(study, storage, again=again)
    low, high = found.test.interval
    click.echo(
        f"Test accuracy {percent(found.test.share)} ({found.test.num_correct} of "
        f"{found.test.num_images} images; 95 % interval {percent(low)} to {percent(high)})"
    )
    click.echo(
        f"Validation accuracy measured again: {percent(found.validation.share)}; recorded: "
        f"{percent(found.recorded_validation)}"
    )
    times = "for the first time" if found.num_openings == 1 else f"{found.num_openings} times"
    click.echo(f"This test split was opened {times}.")


@cli.command()
@click.argument("study")
@_storage
@click.option("--port", type=int, default=5000, show_default=True)
def ui(study: str, storage: str, port: int) -> None:
    """Open MLflow's UI on a study's store."""
    from drtune_ray.addresses import with_secrets
    from drtune_ray.search.outcome import tracking_of
    from drtune_ray.tracking.mlflow_recorder import runs_page

    uri, experiment = tracking_of(study, storage)
    if uri.startswith(("http://", "https://")):
        click.echo(f"This study is recorded at {uri}: open it in a browser.")
        return
    page = runs_page(uri, experiment)
    click.echo(f"Open http://127.0.0.1:{port}{page} in half a minute; Ctrl-C ends it")
    # One reader needs one worker and none of the server's job processes.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # Not as an argument: it may hold a password, and others can read those.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = with_secrets(uri)
    arguments = ["ui", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "mlflow", *arguments, "--workers", "1"]
    sys.stdout.flush()
    os.execv(sys.executable, command)


@cli.command()
@click.argument("study")
@_storage
def sync(study: str, storage: str) -> None:
    """Send MLflow what it has not taken yet."""
    from drtune_ray.search.outcome import sync_study

    click.echo(f"{sync_study(study, storage)} events sent")


@cli.command()
@click.argument("study")
@_storage
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/json.md).")
def status(study: str, storage: str, as_json: bool) -> None:
    """Say how a study or training stands, while it runs or after; changes nothing."""
    from drtune_ray.search.status import facts, read_status

    found = read_status(study, storage)
    if as_json:
        from drtune_ray.display.output import write_json

        write_json(sys.stdout, "status", facts(found))
        return
    from drtune_ray.display.standing import status_lines

    _echo(status_lines(found, _program()))


cli.add_command(deploy)


def _output(stream: TextIO, quiet: bool, as_json: bool, people: Quiet) -> Quiet:
    """The output that the options ask for."""
    from drtune_ray.display.output import JsonLines, Quiet

    if quiet:
        return Quiet()
    return JsonLines(stream) if as_json else people


def _run_study(
    request: Callable[[], tuple[StudyConfig, list[str]]], quiet: bool, as_json: bool
) -> None:
    from rich.console import Console

    from drtune_ray.display.outcome import plan_facts, plan_lines, result_facts, result_lines
    from drtune_ray.display.output import People, is_live, json_stdout, write_json
    from drtune_ray.display.progress import StudyProgress
    from drtune_ray.search.status import read_trials, write_command
    from drtune_ray.search.study import run_study

    console = Console(highlight=False)

    def announce(plan: StudyPlan) -> None:
        folder = plan.config.folder
        write_command(folder)
        if not (quiet or as_json):
            _echo(plan_lines(plan))
        epochs, searched = plan.config.trial.training.epochs, plan.searched
        progress = StudyProgress(
            plan.num_trials, plan.num_done, epochs, searched, plan.of_part(read_trials(folder))
        )
        output.plan(progress, plan_facts(plan))

    with json_stdout(is_wanted=as_json) as stream:
        people = People(console, is_live=is_live(console, os.environ))
        output = _output(stream, quiet, as_json, people)
        config, notes = request()
        for note in notes:
            output.say(note)
        try:
            result = run_study(
                config, observer=output.take, on_plan=announce, on_notice=output.notice
            )
        finally:
            output.close()
        if as_json:
            write_json(stream, "result", result_facts(result))
        else:
            _echo(result_lines(result, _program()))


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _program() -> str:
    """How this program is called from here: by its name only where the shell finds it."""
    found = shutil.which("drtune-ray")
    here = Path(sys.argv[0])
    return "drtune-ray" if found and here.exists() and Path(found).samefile(here) else str(here)


def _resolved(storage: str) -> Path:
    return Path(storage).expanduser().resolve()


def main() -> None:
    """Run the command line; exit codes are in `drtune_ray.errors`."""
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        # One more Ctrl-C must not cut off what Ray ends at exit.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo("\nInterrupted. The same command goes on where it stopped.", err=True)
        sys.exit(INTERRUPTED)
    except DrtuneError as error:
        click.echo(f"drtune-ray: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
