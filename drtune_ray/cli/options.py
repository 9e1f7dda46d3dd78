"""Options and habits that several commands of the command line share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

DEFAULT_STORAGE = "./drtune-studies"
storage_option = click.option(
    "--storage", default=DEFAULT_STORAGE, show_default=True, help="Folder for everything written."
)
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a setting of the trial, like --set training.epochs=20.",
)
data_option = click.option(
    "--data", "data_folder", help="Folder with one folder of images a class."
)
backbone_option = click.option("--backbone", help="A timm model.")
weights_option = click.option("--weights", help="A file, 'timm' (its hub) or 'demo' (packaged).")
epochs_option = click.option("--epochs", type=int, help="Epochs of a trial.")
image_size_option = click.option("--image-size", type=int, help="Side of the images in pixels.")
seed_option = click.option("--seed", type=int, help="Of everything that is drawn.")
name_option = click.option(
    "--name", help="Of its folder; by default the data folder's (for train with -train)."
)
tracking_uri_option = click.option(
    "--tracking-uri", help="MLflow server; by default SQLite under the storage."
)
artifacts_option = click.option(
    "--artifacts",
    help="s3://, gs:// or file:// URI for what the next driver and other nodes need.",
)
quiet_option = click.option(
    "--quiet", is_flag=True, help="The result and warnings only; with --json: the result only."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="JSON lines on stdout, one an event (docs/json.md)."
)
_STUDY_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.argument("study_file", required=False, type=click.Path(path_type=Path)),
    data_option,
    backbone_option,
    weights_option,
    click.option("--trials", type=int, help="How many, the reference trials included."),
    epochs_option,
    image_size_option,
    click.option("--space", help="A shipped search space (quick, dr_tune, ...) or a YAML file."),
    click.option("--storage", help=f"Folder for everything written.  [default: {DEFAULT_STORAGE}]"),
    name_option,
    seed_option,
    click.option("--workers", type=int, help="Ray Train workers of a trial."),
    click.option("--sampler", help="tpe, gp, cma_es, qmc, random, nsga2 or nsga3."),
    click.option("--scheduler", help="Early stopping: asha, median or none."),
    click.option("--finalist-seeds", type=int, help="New seeds for the finalists; 0: no finals."),
    click.option("--final-fit", help="all: train the winner again on validation images too."),
    click.option(
        "--warm-start",
        multiple=True,
        metavar="STUDY",
        help="A study whose trials the sampler learns from, by name or folder.",
    ),
    tracking_uri_option,
    click.option("--optuna-storage", help="URL of a database; by default a file in the study."),
    artifacts_option,
    set_option,
)


def of_study(command: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments that say which study: those of tune, preview and submit."""
    for option in reversed(_STUDY_OPTIONS):
        command = option(command)
    return command


def echo(lines: Iterable[str], *, err: bool = False) -> None:
    """Print lines, to stdout or to stderr."""
    for line in lines:
        click.echo(line, err=err)


def program() -> str:
    """How this program is called from here: by its name only where the shell finds it."""
    found = shutil.which("drtune-ray")
    here = Path(sys.argv[0])
    return "drtune-ray" if found and here.exists() and Path(found).samefile(here) else str(here)
