"""The command line: parse, call one function, print.

Heavy imports stand inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drtune_ray import __version__
from drtune_ray.errors import ConfigError, DrtuneError

if TYPE_CHECKING:
    from drtune_ray.config import StudyConfig
    from drtune_ray.search.driver import StudyPlan, StudyResult

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Find the best DR-Tune fine-tuning of a pretrained vision model for your images."""


@cli.command()
@_storage
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything drawn.")
def demo(storage: str, seed: int) -> None:
    """Run a small real study, start to end."""
    from drtune_ray.demo import demo_config

    _run_study(demo_config(_resolved(storage), seed))


@cli.command()
@click.argument("study_file", required=False, type=click.Path(path_type=Path))
@_data
@_backbone
@_weights
@click.option("--trials", type=int, help="How many, the reference trials included.")
@_epochs
@_image_size
@click.option("--space", help="A shipped search space (quick, dr_tune) or a YAML file.")
@click.option("--storage", help=f"Folder for everything written.  [default: {DEFAULT_STORAGE}]")
@_name
@_seed
@click.option("--workers", type=int, help="Ray Train workers of a trial.")
@_tracking_uri
@click.option("--optuna-storage", help="URL of a database; by default a file in the study.")
@_artifacts
@_set
def tune(study_file: Path | None, assignments: tuple[str, ...], **flags: Any) -> None:
    """Search; the same command resumes, or shows the result."""
    from drtune_ray.search.request import study_request

    config, notes = study_request(study_file, assignments, flags)
    for note in notes:
        click.echo(note)
    _run_study(config)


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
def train(
    trial_file: Path | None,
    assignments: tuple[str, ...],
    storage: str,
    name: str | None,
    tracking_uri: str | None,
    artifacts: str | None,
    **flags: Any,
) -> None:
    """Train one configuration on Ray Train; the same command resumes, or shows the result."""
    from drtune_ray.config import TrackingConfig
    from drtune_ray.display import percent
    from drtune_ray.search.request import default_name, trial_request
    from drtune_ray.search.single import run_training
    from drtune_ray.section import validated
    from drtune_ray.tracking.events import Event, MetricsRecorded

    config, resources, notes = trial_request(trial_file, assignments, flags)
    for note in notes:
        click.echo(note)
    name = name or f"{default_name(config)}-train"

    def show(event: Event) -> None:
        if isinstance(event, MetricsRecorded):
            metrics = event.metrics
            parts = "  ".join(
                f"{key} {metrics[key]:.4f}"
                for key in ("loss", "cross_entropy", "distribution_regularization")
                if key in metrics
            )
            click.echo(
                f"epoch {event.step}/{config.training.epochs}  {parts}  "
                f"validation {percent(metrics['val_accuracy'])}  {metrics['seconds']:.1f} s"
            )

    result = run_training(
        config,
        name,
        Path(storage),
        resources=resources,
        tracking=validated(TrackingConfig, {"uri": tracking_uri}),
        artifacts=artifacts,
        observer=show,
        on_notice=click.echo,
    )
    click.echo("This training was done before." if result.was_done else "Done.")
    click.echo(f"Best validation accuracy {percent(result.val_accuracy)} ({result.outcome})")
    _show_ways_on(result.folder, result.num_unsent)


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
    arguments = ["ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
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


def _run_study(config: StudyConfig) -> None:
    from rich.console import Console

    from drtune_ray.display import StudyDisplay, duration
    from drtune_ray.search.study import run_study

    console = Console(highlight=False)
    display: list[StudyDisplay] = []

    def announce(plan: StudyPlan) -> None:
        _show_plan(plan)
        searched = tuple(plan.searched)
        epochs = plan.config.trial.training.epochs
        display.append(StudyDisplay(console, plan.config.trials, plan.num_done, epochs, searched))
        display[0].__enter__()

    try:
        result = run_study(
            config,
            observer=lambda e: display[0](e) if display else None,
            on_plan=announce,
            on_notice=lambda text: display[0].notice(text) if display else click.echo(text),
        )
    except KeyboardInterrupt:
        click.echo("\nInterrupted. The same command goes on where it stopped.", err=True)
        raise
    finally:
        for shown in display:
            shown.__exit__()
    _show_result(result)
    if not result.was_done:
        click.echo(f"Took {duration(result.seconds)}.")


def _show_plan(plan: StudyPlan) -> None:
    config = plan.config
    trial = config.trial
    click.echo(f"Study {config.name!r}: {config.folder}")
    for note in plan.notes:
        click.echo(f"  {note}")
    click.echo(
        f"  {config.trials} trials ({len(config.reference_trials)} reference trials first), "
        f"{plan.trials_at_a_time} at a time, {config.resources.cpus_per_worker} CPU(s) a worker; "
        f"up to {trial.training.epochs} epochs, {config.scheduler.name} early stopping, "
        f"{config.sampler.name} sampler, seed {config.seed}"
    )
    if plan.num_done:
        click.echo(f"  {plan.num_done} trials were finished before: going on")


def _show_result(result: StudyResult) -> None:
    from drtune_ray.display import percent
    from drtune_ray.values import flattened

    if result.was_done:
        click.echo("This study is done; nothing was left to run.")
    winner = result.winner
    num_completed = sum(trial.state == "COMPLETE" for trial in result.trials)
    click.echo(f"\nBest of {len(result.trials)} trials: trial {winner.label}")
    values = flattened(winner.config)
    for path in result.searched:
        if winner.reference is None or path in values:
            click.echo(f"  {path} = {values[path]}")
    click.echo(
        f"\nValidation accuracy (the winner's is the maximum of {num_completed} completed trials, "
        "one seed each:\nit flatters; the test split does not)"
    )
    click.echo(f"  {'best trial ' + winner.label:<32} {percent(winner.best_val_accuracy):>9}")
    for trial in result.references:
        name = f"reference trial {trial.label}"
        outcome = "" if trial.state == "COMPLETE" else f"  {trial.outcome}"
        click.echo(f"  {name:<32} {percent(trial.best_val_accuracy):>9}{outcome}")
    click.echo()
    _show_ways_on(result.folder, result.num_unsent)


def _show_ways_on(folder: Path, num_unsent: int) -> None:
    if num_unsent:
        click.echo(
            f"{num_unsent} events have not reached MLflow; send them with\n"
            f"  {_program()} sync {folder}"
        )
    click.echo(f"Everything lies in        {folder}")
    click.echo(f"Open the MLflow UI:       {_program()} ui {folder}")
    click.echo(f"Test the winner:          {_program()} evaluate {folder}")


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
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except DrtuneError as error:
        click.echo(f"drtune-ray: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
