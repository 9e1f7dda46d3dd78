"""Commands about a storage: its studies, and what of them may be deleted."""

from __future__ import annotations

import sys

import click

from drtune_ray.cli.options import echo, program, storage_option


@click.command()
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a study.")
def studies(storage: str, as_json: bool) -> None:
    """List the studies and trainings under a storage, the latest first."""
    from drtune_ray.errors import DrtuneError
    from drtune_ray.storage.record import find_studies
    from drtune_ray.study.status import facts, read_status

    found = []
    for folder in find_studies(storage):
        try:
            found.append(read_status(str(folder), storage))
        except DrtuneError as error:  # one that is damaged does not hide the others
            click.echo(f"{folder.name}: {error}", err=True)
    if as_json:
        from drtune_ray.display.outputs import write_json

        for each in found:
            write_json(sys.stdout, "status", facts(each))
        return
    from drtune_ray.display.studies import studies_lines

    echo(studies_lines(found))


@click.command()
@click.argument("study")
@storage_option
@click.option(
    "--cache",
    is_flag=True,
    help="Include the prepared images and features, which all studies of the storage share.",
)
@click.option("--yes", is_flag=True, help="Delete it.")
def clean(study: str, storage: str, cache: bool, yes: bool) -> None:
    """Show what may be deleted of a study and how much that frees; delete it with --yes.

    Record, tables, events and the winner are always kept, and the study can be continued. Files
    under --artifacts and in MLflow are not touched.
    """
    from drtune_ray.display.studies import cleaning_lines
    from drtune_ray.storage.record import find_study
    from drtune_ray.study import cleaning

    folder = find_study(study, storage)
    act = cleaning.clean if yes else cleaning.removable_files
    found = act(study, storage, cache=cache)
    echo(cleaning_lines(folder, found, program(), is_deleted=yes, cache=cache))
