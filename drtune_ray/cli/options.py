"""Options and output that several commands share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

DEFAULT_STORAGE = "./drtune-studies"
SEED_HELP = "Random seed for initial weights, augmentations and sampling."
# Options whose setting has a default for the machine at hand (drtune_ray/study/machine.py).
FITTED = ("backbone", "weights", "trials", "epochs", "image_size")


class SettingOption(click.Option):
    """Option that sets one field of a study or trial, with the text under the field as its help."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option's name and its help, which only ``--help`` has to import."""
        from drtune_ray.config.settings_page import choices, default_text, field_at, summary
        from drtune_ray.config.sources import STUDY_FLAGS, TRIAL_FLAGS
        from drtune_ray.config.study import StudyConfig

        name = self.name or ""
        field = field_at(StudyConfig, STUDY_FLAGS.get(name) or f"trial.{TRIAL_FLAGS[name]}")
        default = "fits the machine" if name in FITTED else default_text(field)
        self.help = summary(field).replace("`", "")
        if self.multiple:
            self.help += " May be repeated."
        if default not in ("", "null", "[]") and not self.show_default:
            self.help += f"  [default: {default}]"
        if found := choices(field):
            self.metavar = f"[{'|'.join(found)}]"
        return super().get_help_record(ctx)


def _setting(*names: str, **options: Any) -> Callable[..., Any]:
    return click.option(*names, cls=SettingOption, **options)


storage_option = click.option(
    "--storage",
    default=DEFAULT_STORAGE,
    show_default=True,
    metavar="DIR",
    help="Folder of the studies and of everything that belongs to them.",
)
set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a setting, as in --set training.epochs=20 (docs/settings.md). May be repeated.",
)
data_option = _setting("--data", "data_folder", metavar="SOURCE")
backbone_option = _setting("--backbone", metavar="NAME")
weights_option = _setting("--weights", metavar="FILE|timm|demo")
epochs_option = _setting("--epochs", type=int)
image_size_option = _setting("--image-size", type=int)
workers_option = _setting("--workers", type=int)
tracking_uri_option = _setting("--tracking-uri", metavar="URI")
optuna_storage_option = _setting("--optuna-storage", metavar="URL")
artifacts_option = _setting("--artifacts", metavar="URI")
quiet_option = click.option(
    "--quiet", is_flag=True, help="Print the result and warnings only; with --json, the result."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON lines, one per event (docs/json.md)."
)
_STUDY_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.argument("study_file", required=False, type=click.Path(path_type=Path)),
    data_option,
    backbone_option,
    weights_option,
    _setting("--trials", type=int),
    epochs_option,
    image_size_option,
    _setting("--space", metavar="NAME|FILE"),
    _setting("--storage", metavar="DIR"),
    _setting("--name"),
    click.option("--seed", type=int, help=SEED_HELP),
    workers_option,
    _setting("--sampler"),
    _setting("--scheduler"),
    _setting("--finalist-seeds", type=int),
    _setting("--final-fit"),
    _setting("--warm-start", multiple=True, metavar="STUDY"),
    tracking_uri_option,
    optuna_storage_option,
    artifacts_option,
    set_option,
)


def of_study(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the arguments that describe a study: those of tune, preview and submit."""
    for option in reversed(_STUDY_OPTIONS):
        command = option(command)
    return command


def echo(lines: Iterable[str], *, err: bool = False) -> None:
    """Print lines, to stdout or to stderr, wrapped to the width of a terminal."""
    from drtune_ray.display.text import wrapped

    for line in lines:
        click.echo(wrapped(line, sys.stderr if err else sys.stdout), err=err)


def program() -> str:
    """Return what starts this program here: its name where the shell finds it, else its path."""
    found = shutil.which("drtune-ray")
    here = Path(sys.argv[0])
    return "drtune-ray" if found and here.exists() and Path(found).samefile(here) else str(here)
