"""The command that writes a model as one file: parse, call one function, print."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from drtune_ray.cli.options import echo, storage_option

FORMATS = ("onnx", "pt2", "safetensors")


@click.command()
@click.argument("model")
@storage_option
@click.option(
    "--to",
    "kind",
    type=click.Choice(FORMATS),
    required=True,
    help="Format: ONNX, a program of torch.export, or weights alone.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write. Default: in the folder exports of the study.",
)
@click.option(
    "--int8",
    "is_int8",
    is_flag=True,
    help="Write ONNX with 8 bits, and measure what that costs on the validation images.",
)
@click.option(
    "--images",
    multiple=True,
    metavar="FILES",
    help="Images to compare on: files, folders or patterns. Default: validation images. May be "
    "repeated.",
)
def export(
    model: str,
    storage: str,
    kind: str,
    output: Path | None,
    is_int8: bool,
    images: tuple[str, ...],
) -> None:
    """Write a trained model as one file.

    MODEL is the name of a study or training, its folder, or a model's folder (winner).

    Class names and preprocessing travel in the file. It is written once its probabilities for real
    images equal those of the model to 1e-4.
    """
    from drtune_ray.data.image_files import image_files
    from drtune_ray.display.exports import export_lines
    from drtune_ray.study.exporting import export_model  # only now: it imports torch

    paths = list(image_files(images, sys.stdin))
    echo(export_lines(export_model(model, storage, kind, output, paths, is_int8=is_int8)))
