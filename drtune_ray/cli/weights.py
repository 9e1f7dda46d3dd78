"""`drtune-ray weights` and `drtune-ray backbones`: what a file holds, what timm offers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from drtune_ray.cli.options import echo
from drtune_ray.errors import ConfigError

if TYPE_CHECKING:
    from drtune_ray.config.inputs import BackboneConfig

json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON lines (docs/json.md).")


@click.group()
def weights() -> None:
    """Check a weights file before a study."""


@weights.command()
@click.argument("file")
@click.option("--backbone", required=True, metavar="NAME", help="Name of a timm model.")
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Side of the images in pixels. Default: that of timm's weights.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a setting of the backbone, as in --set backbone.weights_format=dino. May be "
    "repeated.",
)
@json_flag
def check(
    file: str, backbone: str, image_size: int | None, assignments: tuple[str, ...], as_json: bool
) -> None:
    """Report what FILE is and how its tensors fit a backbone.

    The exit code is 2 if a study would refuse it.
    """
    config = _config(file, backbone, assignments)
    from drtune_ray.display.outputs import write_json
    from drtune_ray.display.weights import weights_facts, weights_lines
    from drtune_ray.training.weights_check import check_weights

    found = check_weights(config, image_size)
    if as_json:
        write_json(sys.stdout, "weights_check", weights_facts(found))
    else:
        echo(weights_lines(found))
    if found.problem is not None:
        raise found.problem


def _config(file: str, backbone: str, assignments: tuple[str, ...]) -> BackboneConfig:
    from drtune_ray.config.inputs import BackboneConfig
    from drtune_ray.config.section import validated
    from drtune_ray.values import parse_assignments

    values = parse_assignments(assignments)
    if others := sorted(path for path in values if not path.startswith("backbone.")):
        raise ConfigError(
            f"--set {others[0]} is no setting of the backbone: give backbone.NAME=VALUE"
        )
    settings = {path.removeprefix("backbone."): value for path, value in values.items()}
    given = {"name": backbone, "weights": file} | settings
    return validated(BackboneConfig, given, "backbone.")


@click.command()
@click.argument("pattern", required=False)
@json_flag
def backbones(pattern: str | None, as_json: bool) -> None:
    """List the models of timm that match PATTERN, as in 'resnet*', with their sizes.

    Without PATTERN the names alone. No weights are loaded and nothing is fetched.
    """
    from drtune_ray.display.outputs import write_json
    from drtune_ray.display.weights import HEADER, backbone_line, backbone_values
    from drtune_ray.training.backbone_list import backbone_facts, backbone_names

    names = backbone_names(pattern)
    if pattern is None:
        if as_json:
            write_json(sys.stdout, "backbones", {"names": names})
            return
        echo(names)
        echo(["give a pattern, as in drtune-ray backbones 'resnet*', for sizes"], err=True)
        return
    if not as_json:
        click.echo(HEADER)
    for name in names:
        facts = backbone_facts(name)
        if as_json:
            write_json(sys.stdout, "backbone", backbone_values(facts))
        else:
            click.echo(backbone_line(facts))
