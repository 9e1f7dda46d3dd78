"""The command that serves a model on this machine: parse, call one function, print."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import click

from drtune_ray.cli.options import storage_option


@click.command()
@click.argument("model")
@storage_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; another machine's requests need a token.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Most images that go through the model at a time.",
)
@click.option(
    "--replicas",
    "num_replicas",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Copies of the model, which share the CPUs and GPUs.",
)
@click.option("--tracking-uri", metavar="URI", help="MLflow of a MODEL models:/NAME@ALIAS.")
def serve(
    model: str,
    storage: str,
    host: str,
    port: int,
    batch_size: int,
    num_replicas: int,
    tracking_uri: str | None,
) -> None:
    """Answer requests with a model's predictions, by Ray Serve; Ctrl-C ends it.

    MODEL is as in predict. POST an image file, or JSON {"images": [...]} with files in base64.
    Requests need the token in DRTUNE_SERVE_TOKEN if it is set (docs/model.md).
    """
    from drtune_ray.execution.serving import TOKEN_VARIABLE, check_place, served

    check_place(host, has_token=bool(os.environ.get(TOKEN_VARIABLE)))
    from drtune_ray.results.places import served_model  # only now: it imports torch

    place, uri = served_model(model, storage, tracking_uri)
    try:
        with served(
            place,
            host,
            port,
            tracking_uri=uri,
            batch_size=batch_size,
            num_replicas=num_replicas,
        ) as address:
            click.echo(f"{Path(place).name} answers at {address}; Ctrl-C ends it")
            threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("Ended.")
