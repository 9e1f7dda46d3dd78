"""The command that copies a model's package elsewhere: parse, call one function, print."""

from __future__ import annotations

import click

from drtune_ray.cli.options import storage_option


@click.command()
@click.argument("model")
@click.argument("target")
@storage_option
@click.option("--public", "is_public", is_flag=True, help="Make a new repository public.")
def push(model: str, target: str, storage: str, is_public: bool) -> None:
    """Copy a model to a folder or to a repository of the Hugging Face hub.

    MODEL is the name of a study or training, its folder, or a model's folder (winner). TARGET is a
    folder, or hf://OWNER/NAME; the repository is made, private, if it does not exist.
    """
    from drtune_ray.study.pushing import push_model  # only now: it imports torch

    click.echo(push_model(model, target, storage, is_private=not is_public))
