"""The command that writes a study's report."""

from __future__ import annotations

from pathlib import Path

import click

from drtune_ray.cli.options import storage_option


@click.command()
@click.argument("study")
@storage_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to write.  [default: report.html in the study's folder]",
)
@click.option("--no-images", is_flag=True, help="Leave out pictures of misclassified images.")
def report(study: str, storage: str, output: Path | None, no_images: bool) -> None:
    """Write the report of a study: one HTML file that opens offline.

    Works while the study runs and afterwards. The test split is not opened.
    """
    from drtune_ray.storage.record import find_study

    folder = find_study(study, storage)
    from drtune_ray.study.report import report_study  # only now: it imports torch

    path = report_study(str(folder), storage, output=output, with_images=not no_images)
    click.echo(f"Report: {path}")
