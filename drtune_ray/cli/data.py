"""`drtune-ray data`: check the images of a source, or write them as Parquet shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from drtune_ray.cli.options import echo
from drtune_ray.errors import ConfigError

if TYPE_CHECKING:
    from drtune_ray.config.inputs import DataConfig

set_data_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a setting of the images, as in --set data.label_column=kind. May be repeated.",
)


@click.group()
def data() -> None:
    """Check images before a study, or write them as Parquet shards."""


@data.command()
@click.argument("source")
@set_data_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/json.md).")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a page with the pictures to this file.",
)
def check(source: str, assignments: tuple[str, ...], as_json: bool, page: Path | None) -> None:
    """Read every image of SOURCE and report what would stop a study, and what looks wrong.

    The exit code is 2 if there are errors.
    """
    config = _config(source, assignments)
    from drtune_ray.data.check import check_source
    from drtune_ray.display.images import check_facts, check_lines, check_page
    from drtune_ray.display.outputs import write_json

    found = check_source(config)
    if page is not None:
        _write(page, check_page(found))
    if as_json:
        write_json(sys.stdout, "data_check", check_facts(found))
    else:
        echo(check_lines(found))
    if found.has_errors:
        sys.exit(ConfigError.exit_code)


@data.command()
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@set_data_option
def prepare(source: str, out: Path, assignments: tuple[str, ...]) -> None:
    """Write the images of SOURCE to the new folder OUT as Parquet shards, one set a split.

    A study on OUT keeps the splits. `datasets` and pandas read the shards.
    """
    config = _config(source, assignments)
    from drtune_ray.data.prepare import prepare_images
    from drtune_ray.display.images import prepared_lines
    from drtune_ray.values import full_path

    manifest = prepare_images(config, full_path(out))
    echo(prepared_lines(manifest, out))


def _config(source: str, assignments: tuple[str, ...]) -> DataConfig:
    from drtune_ray.config.inputs import DataConfig
    from drtune_ray.config.section import validated
    from drtune_ray.values import parse_assignments

    values = {"data.train": source} | parse_assignments(assignments)
    if others := sorted(path for path in values if not path.startswith("data.")):
        raise ConfigError(f"--set {others[0]} is no setting of the images: give data.NAME=VALUE")
    settings = {path.removeprefix("data."): value for path, value in values.items()}
    return validated(DataConfig, settings, "data.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--html {path} cannot be written ({error.strerror}): give another file"
        ) from None
