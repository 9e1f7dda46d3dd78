"""Serving a model on this machine with Ray Serve."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.execution.capacity import Capacity
from drtune_ray.execution.session import ray_session

TOKEN_VARIABLE = "DRTUNE_SERVE_TOKEN"  # nosec B105 # the name of a variable
APPLICATION, DEPLOYMENT = "drtune-ray", "ImageService"  # names in Ray Serve


def check_place(host: str, *, has_token: bool) -> None:
    """Refuse to let other machines in without a token.

    Raises:
        ConfigError: If the address is not this machine's own and there is no token.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not (is_loopback or has_token):
        raise ConfigError(
            f"--host {host} lets other machines ask: set {TOKEN_VARIABLE} to a secret of your "
            "choice, or leave --host out"
        )


@contextmanager
def served(
    model: str,
    host: str,
    port: int,
    *,
    tracking_uri: str | None = None,
    batch_size: int = 32,
    num_replicas: int = 1,
) -> Iterator[str]:
    """Serve a model within a block; yields the address.

    Args:
        model: Model as `predict` takes it, with a full path.
        host: Address to listen on.
        port: Port to listen on.
        tracking_uri: MLflow's tracking URI, for a model of its registry.
        batch_size: Most images that go through the model at a time.
        num_replicas: Number of copies of the model, which share the CPUs and GPUs.

    Raises:
        EnvironmentProblem: If Ray Serve is not installed, or the model does not start.
    """
    try:
        import ray.serve  # noqa: F401 # its further packages are an extra
    except ImportError:
        raise EnvironmentProblem(
            "serving needs further packages: pip install 'drtune-ray[serve]'"
        ) from None
    with ray_session() as capacity:
        from ray import serve
        from ray.serve.exceptions import RayServeException

        from drtune_ray.execution.serve_app import build

        application = build(
            {
                "model": model,
                "tracking_uri": tracking_uri,
                "requires_token": False,  # nosec B105 # yes or no, no secret
                "batch_size": batch_size,
                "num_replicas": num_replicas,
                **_share(capacity, num_replicas),
            }
        )
        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
            yield f"http://{host}:{port}/"
        except (RayServeException, RuntimeError) as error:
            raise EnvironmentProblem(f"the model cannot be served: {error}") from error
        finally:
            serve.shutdown()


def _share(capacity: Capacity, num_replicas: int) -> dict[str, float]:
    """Return the CPUs and GPUs of a replica."""
    cpus = sum(node.num_cpus for node in capacity.nodes)
    gpus = sum(node.num_gpus for node in capacity.nodes)
    return {
        "num_cpus": max(1, int(cpus // num_replicas)),
        "num_gpus": min(1.0, gpus / num_replicas),
    }
