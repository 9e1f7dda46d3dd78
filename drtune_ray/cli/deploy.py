"""`drtune-ray deploy`: manifests of Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def deploy() -> None:
    """Make manifests for Kubernetes with KubeRay (docs/kubernetes.md)."""


@deploy.command()
@click.argument("study_file", type=click.Path(path_type=Path))
@click.option("--overlay", required=True, help="kind-cpu, gpu, gpu-spot, kueue, gke or eks.")
@click.option("--claim", help="Volume that all pods mount under /storage.")
@click.option("--data-claim", help="Volume that the head mounts, read-only, under /data.")
@click.option(
    "--secret",
    default="drtune-study",
    show_default=True,
    help="Its keys are the environment variables that the study names.",
)
@click.option("--namespace", default="drtune-ray", show_default=True, help="Of all objects.")
@click.option("--image", help="Instead of drtune-ray:VERSION-cpu or -cuda.")
@click.option(
    "--worker-memory",
    "worker_memory_gib",
    type=click.IntRange(min=1),
    metavar="GIB",
    help="Of a worker of a trial.",
)
@click.option(
    "--head-memory",
    "head_memory_gib",
    type=click.IntRange(min=1),
    metavar="GIB",
    help="Of the head, which prepares the data and drives the study.",
)
@click.option(
    "--deadline-hours",
    type=click.IntRange(min=1, max=24 * 365),
    default=24,
    show_default=True,
    help="After so long the study is stopped.",
)
def render(study_file: Path, **options: Any) -> None:
    """Write the RayJob of a study, for kubectl apply -f -."""
    from drtune_ray.manifests.render import RenderOptions, render_study, to_documents

    rendered = render_study(study_file, RenderOptions(**options))
    for note in rendered.notes:
        click.echo(note, err=True)
    click.echo(to_documents(rendered.objects), nl=False)
