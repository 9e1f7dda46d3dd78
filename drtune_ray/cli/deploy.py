"""The command ``drtune-ray deploy``: manifests for Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def deploy() -> None:
    """Make manifests for Kubernetes with KubeRay (docs/kubernetes.md)."""


@deploy.command()
@click.argument("study_file", type=click.Path(path_type=Path))
@click.option(
    "--overlay", required=True, help="Kind of cluster: kind-cpu, gpu, gpu-spot, kueue, gke or eks."
)
@click.option("--claim", help="PersistentVolumeClaim that all pods mount at /storage.")
@click.option("--data-claim", help="PersistentVolumeClaim that the head mounts read-only at /data.")
@click.option(
    "--secret",
    default="drtune-study",
    show_default=True,
    help="Secret whose keys are the environment variables that the study names.",
)
@click.option(
    "--namespace", default="drtune-ray", show_default=True, help="Namespace of all objects."
)
@click.option(
    "--image", help="Container image. Default: drtune-ray:VERSION-cpu or drtune-ray:VERSION-cuda."
)
@click.option(
    "--worker-memory",
    "worker_memory_gib",
    type=click.IntRange(min=1),
    metavar="GIB",
    help="Memory of each worker of a trial, in GiB. Default: the template's.",
)
@click.option(
    "--head-memory",
    "head_memory_gib",
    type=click.IntRange(min=1),
    metavar="GIB",
    help="Memory of the head, which prepares the data and runs the search, in GiB. Default: the "
    "template's.",
)
@click.option(
    "--deadline-hours",
    type=click.IntRange(min=1, max=24 * 365),
    default=24,
    show_default=True,
    help="Hours after which the study is stopped.",
)
@click.option(
    "--service",
    "is_service",
    is_flag=True,
    help="Print a RayService, which answers with the model of the finished study, instead.",
)
@click.option(
    "--replicas",
    "num_replicas",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Pods of the service, each with a copy of the model.",
)
def render(study_file: Path, is_service: bool, num_replicas: int, **options: Any) -> None:
    """Print the manifests of a study's RayJob, for kubectl apply -f -."""
    from drtune_ray.manifests.render import RenderOptions, render_study, to_documents
    from drtune_ray.manifests.service import render_service

    chosen = RenderOptions(**options)
    if is_service:
        rendered = render_service(study_file, chosen, num_replicas)
    else:
        rendered = render_study(study_file, chosen)
    for note in rendered.notes:
        click.echo(note, err=True)
    click.echo(to_documents(rendered.objects), nl=False)
