"""The command line: parse, call one function, print.

Heavy imports stand inside the commands, so that ``--help`` answers quickly.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from drtune_ray import __version__
from drtune_ray.cli.compare import compare
from drtune_ray.cli.data import data
from drtune_ray.cli.deploy import deploy
from drtune_ray.cli.doctor import doctor
from drtune_ray.cli.export import export
from drtune_ray.cli.jobs import insecure_http_option, logs, show_jobs, stop, submit
from drtune_ray.cli.options import (
    DEFAULT_STORAGE,
    SEED_HELP,
    artifacts_option,
    backbone_option,
    data_option,
    echo,
    epochs_option,
    image_size_option,
    json_option,
    of_study,
    program,
    quiet_option,
    set_option,
    storage_option,
    tracking_uri_option,
    weights_option,
    workers_option,
)
from drtune_ray.cli.predict import predict
from drtune_ray.cli.push import push
from drtune_ray.cli.report import report
from drtune_ray.cli.serve import serve
from drtune_ray.cli.standard_streams import tolerate_failing_streams
from drtune_ray.cli.storage import clean, studies
from drtune_ray.cli.weights import backbones, weights
from drtune_ray.errors import ConfigError, DrtuneError
from drtune_ray.import_path import ROOT, leave_out_current_folder

if TYPE_CHECKING:
    from drtune_ray.config.study import StudyConfig
    from drtune_ray.display.outputs import Quiet
    from drtune_ray.study.result import StudyPlan


INTERRUPTED = 130
PRESET_HELP = "Preset of method and recipe to start from (docs/presets.md)."
NAME_HELP = (
    "Name of the training and of its folder under the storage. Default: the data folder's name "
    "with -train."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Find the best DR-Tune fine-tuning of a pretrained vision model for your images."""


@cli.command()
@storage_option
@click.option("--seed", type=int, default=0, show_default=True, help=SEED_HELP)
@quiet_option
@json_option
def demo(storage: str, seed: int, quiet: bool, as_json: bool) -> None:
    """Run a small real study from start to end.

    Ctrl-C works as in tune: the same command resumes.
    """
    from drtune_ray.demo import demo_config

    _run_study(lambda: (demo_config(_resolved(storage), seed), []), quiet, as_json)


@cli.command()
@of_study
@quiet_option
@json_option
def tune(
    study_file: Path | None,
    assignments: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Search for the best trial.

    The same command resumes the study, or shows its result.

    At Ctrl-C (or SIGTERM) the running trials save checkpoints at their next step, and the exit code
    is 130; the same command resumes there. A second Ctrl-C does not wait: the same command then
    resumes from the last checkpoints, those of an epoch's end or of training.save_every_seconds.
    """
    from drtune_ray.study.resolve import study_request

    _run_study(lambda: study_request(study_file, assignments, flags), quiet, as_json)


@cli.command()
@of_study
@json_option
def preview(
    study_file: Path | None, assignments: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Estimate what a study will cost, in a minute or two; takes the arguments of tune.

    Trains for seconds on some of the images; writes nothing under the storage.
    """
    from drtune_ray.display.outputs import json_stdout, write_json
    from drtune_ray.display.preview import preview_facts, preview_lines
    from drtune_ray.study.resolve import study_request

    with json_stdout(is_wanted=as_json) as stream:
        config, notes = study_request(study_file, assignments, flags)
        if not as_json:
            echo(notes)
        from drtune_ray.preview.estimate import preview_study  # only now: it imports torch and Ray

        found = preview_study(config)
        if as_json:
            write_json(stream, "preview", preview_facts(found))
        else:
            echo(preview_lines(found))


@cli.command()
@click.argument("trial_file", required=False, type=click.Path(path_type=Path))
@data_option
@backbone_option
@weights_option
@epochs_option
@image_size_option
@click.option("--preset", metavar="[default|paper|authors]", help=PRESET_HELP)
@workers_option
@storage_option
@click.option("--name", help=NAME_HELP)
@click.option("--seed", type=int, help="Random seed for initial weights and augmentations.")
@tracking_uri_option
@artifacts_option
@set_option
@click.option(
    "--from",
    "repeated",
    metavar="STUDY:NUMBER",
    help="Repeat this trial of a study, with its images and seed, and compare the result.",
)
@quiet_option
@json_option
def train(
    trial_file: Path | None,
    repeated: str | None,
    assignments: tuple[str, ...],
    storage: str,
    name: str | None,
    tracking_uri: str | None,
    artifacts: str | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train one configuration on Ray Train.

    The same command resumes the training, or shows its result.
    """
    from drtune_ray.config.section import validated
    from drtune_ray.config.study import TrackingConfig
    from drtune_ray.display.outputs import TrainingLines, json_stdout, write_json
    from drtune_ray.display.repeated import repeated_facts, repeated_lines
    from drtune_ray.display.result import training_facts, training_lines
    from drtune_ray.study.resolve import Place, training_name, trial_request
    from drtune_ray.tracking.events import Event, RunStarted

    with json_stdout(is_wanted=as_json) as stream:
        original = None
        if repeated is not None:
            from drtune_ray.study.repeat import original_trial

            given = {"TRIAL_FILE": trial_file} | {f"--{key}": flags[key] for key in flags}
            original = original_trial(repeated, storage, given, assignments)
            config, resources, notes = original.config, original.resources, list[str]()
            storage, name = original.storage, name or original.name
        else:
            place = Place(storage, name, artifacts)
            config, resources, notes = trial_request(trial_file, assignments, flags, place)
        output = _output(stream, quiet, as_json, TrainingLines(config.training.last_epoch))
        for note in notes:
            output.say(note)
        from drtune_ray.study.status import write_command  # only now: they import torch and Ray
        from drtune_ray.study.training_run import run_training

        name = name or training_name(config.data.train)
        folder = _resolved(storage) / name

        def announce(plan: Iterable[str]) -> None:
            for note in plan:
                output.say(f"  {note}")

        def observe(event: Event) -> None:
            if isinstance(event, RunStarted):
                write_command(folder)
            output.take(event)

        result = run_training(
            config,
            name,
            Path(storage),
            resources=resources,
            tracking=validated(TrackingConfig, {"uri": tracking_uri}, "tracking."),
            artifacts=artifacts,
            observer=observe,
            on_plan=announce,
            on_notice=output.notice,
        )
        if as_json:
            write_json(stream, "result", training_facts(result) | repeated_facts(original, result))
        else:
            echo([*training_lines(result, program()), *repeated_lines(original, result)])


@cli.command()
@click.argument("study")
@storage_option
@click.option("--again", is_flag=True, help="Open the test split although it was opened before.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/json.md).")
def evaluate(study: str, storage: str, again: bool, as_json: bool) -> None:
    """Test the winner on the sealed test split.

    The result is recorded: a second call shows it again without opening the split.
    """
    from drtune_ray.display.outputs import json_stdout, write_json
    from drtune_ray.display.result import evaluation_lines
    from drtune_ray.storage.record import find_study

    folder = find_study(study, storage)
    from drtune_ray.study.evaluation import evaluate_study  # only now: it imports torch

    with json_stdout(is_wanted=as_json) as stream:
        found = evaluate_study(str(folder), storage, again=again)
        if as_json:
            write_json(stream, "evaluation", found.to_mapping())
        else:
            echo(evaluation_lines(found))


@cli.command()
@click.argument("study")
@storage_option
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    help="Port of the UI on this machine.",
)
def ui(study: str, storage: str, port: int) -> None:
    """Serve MLflow's UI for a study on this machine."""
    from drtune_ray.server_uri import with_secrets
    from drtune_ray.study.sync import page_of

    uri, page = page_of(study, storage)
    if page is None:
        click.echo(f"This study is recorded at {uri}: open it in a browser.")
        return
    click.echo(f"Open http://127.0.0.1:{port}{page} in half a minute; Ctrl-C ends it")
    # One reader needs one worker and none of the server's job processes.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # Not as an argument: it may hold a password, and others can read those.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = with_secrets(uri)
    # Neither may import from the current directory: Python, and uvicorn, which MLflow starts.
    os.environ |= {"PYTHONSAFEPATH": "1", "UVICORN_APP_DIR": ROOT}
    arguments = ["ui", "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "mlflow", *arguments, "--workers", "1"]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # nosec B606 # no shell, of the input a number only


@cli.command()
@click.argument("study")
@storage_option
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Send all events again, and restore what was deleted in MLflow.",
)
@click.option(
    "--promote",
    "is_promoted",
    is_flag=True,
    help="Make the model the champion of the study's name if it beats the present one on the same "
    "validation images.",
)
def sync(study: str, storage: str, everything: bool, is_promoted: bool) -> None:
    """Send MLflow the events that it has not received yet.

    Sending an event twice changes nothing.
    """
    from drtune_ray.study.sync import sync_study

    if not is_promoted:
        click.echo(f"{sync_study(study, storage, everything=everything)} events sent")
        return
    from drtune_ray.study.registration import promote_model

    found = promote_model(study, storage, everything=everything)
    state = "is" if found.is_champion else "is not"
    echo([f"{found.uri} {state} this model, version {found.version}: {found.reason}"])


@cli.command()
@click.argument("study", required=False)
@click.option(
    "--storage", metavar="DIR", help=f"Folder of the studies.  [default: {DEFAULT_STORAGE}]"
)
@click.option("--address", metavar="URL", help="Show the study's jobs on this job server instead.")
@insecure_http_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/json.md).")
def status(
    study: str | None,
    storage: str | None,
    address: str | None,
    insecure_http: bool,
    as_json: bool,
) -> None:
    """Show the progress of a study or training; without STUDY, of all under the storage.

    Works while it runs and afterwards, and changes nothing.
    """
    if address is not None:
        if study is None:
            raise click.UsageError("--address needs the name of a study")
        show_jobs(study, storage, address, insecure_http, as_json)
        return
    from drtune_ray.storage.record import find_studies
    from drtune_ray.study.status import facts, read_status

    storage = storage or DEFAULT_STORAGE
    names = [study] if study is not None else map(str, find_studies(storage))
    found = [read_status(name, storage) for name in names]
    if as_json:
        from drtune_ray.display.outputs import write_json

        for each in found:
            write_json(sys.stdout, "status", facts(each))
        return
    from drtune_ray.display.status import overview_lines, status_lines

    echo(status_lines(found[0], program()) if len(found) == 1 else overview_lines(found))


COMMANDS = (
    *(backbones, clean, compare, data, deploy, doctor, export, logs, predict, push, report, serve),
    *(stop, studies, submit, weights),
)
for command in COMMANDS:
    cli.add_command(command)


def _output(stream: TextIO, quiet: bool, as_json: bool, people: Quiet) -> Quiet:
    """Return the output that the options select."""
    from drtune_ray.display.outputs import JsonLines, Quiet

    if quiet:
        return Quiet()
    return JsonLines(stream) if as_json else people


def _run_study(
    request: Callable[[], tuple[StudyConfig, list[str]]], quiet: bool, as_json: bool
) -> None:
    from rich.console import Console

    from drtune_ray.display.outputs import People, is_live, json_stdout, write_json

    console = Console(highlight=False)
    with json_stdout(is_wanted=as_json) as stream:
        people = People(console, is_live=is_live(console, os.environ))
        output = _output(stream, quiet, as_json, people)
        config, notes = request()
        for note in notes:
            output.say(note)
        from drtune_ray.display.result import plan_lines, result_facts, result_lines
        from drtune_ray.display.script import run_shown  # only now: it imports torch and Ray
        from drtune_ray.study.status import write_command

        def announce(plan: StudyPlan) -> None:
            write_command(plan.config.folder)
            if not (quiet or as_json):
                echo(plan_lines(plan))

        result = run_shown(config, output, on_plan=announce)
        if as_json:
            write_json(stream, "result", result_facts(result))
        else:
            echo(result_lines(result, program()))


def _resolved(storage: str) -> Path:
    from drtune_ray.values import full_path

    return full_path(storage)


def main() -> None:
    """Run the command line; exit codes are in `drtune_ray.errors`."""
    leave_out_current_folder()
    tolerate_failing_streams()
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _ignore_interrupts()
        click.echo("\nInterrupted. The same command resumes where it stopped.", err=True)
        sys.exit(INTERRUPTED)
    except DrtuneError as error:
        click.echo(f"drtune-ray: {error}", err=True)
        sys.exit(error.exit_code)
    if code == INTERRUPTED:
        _ignore_interrupts()
    sys.exit(code if isinstance(code, int) else 0)


def _ignore_interrupts() -> None:
    """Ignore a further Ctrl-C, which would cut off what Ray ends at exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
