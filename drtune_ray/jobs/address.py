"""Check the address of a job server; who can reach it, or read its traffic, can run code there."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from drtune_ray.errors import ConfigError

SHAPE = "http(s)://HOST:PORT, that of the cluster's dashboard"


def checked_address(address: str, *, insecure_http: bool) -> str:
    """Return the base URL of a job server.

    Args:
        address: Address as the user gave it.
        insecure_http: Whether to allow plain http to another machine.

    Raises:
        ConfigError: If it is not valid, or if others could read and change what is sent there.
    """
    parts = _parts(address)
    host = parts.hostname or ""
    if parts.scheme == "http" and not (insecure_http or is_loopback(host)):
        raise ConfigError(
            f"--address {address} uses plain http to another machine: anyone on the network path "
            "can read the token and run code on the cluster. Give https://, reach the server "
            "through `ssh -L` or `kubectl port-forward` at http://127.0.0.1:PORT, or add "
            "--insecure-http if you trust the whole network"
        )
    return address.rstrip("/")


def is_loopback(host: str) -> bool:
    """Return whether a host name or address stands for this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parts(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # such as a port that is not a number, or an extra bracket
        is_valid = False
    if not is_valid:
        raise ConfigError(f"--address {address!r} is not the address of a job server: give {SHAPE}")
    if "@" in parts.netloc or parts.query or parts.fragment:  # they may hold a secret
        raise ConfigError(
            f"--address takes no user, password, query or fragment: give {SHAPE}, and the token in "
            "RAY_AUTH_TOKEN or in a file"
        )
    return parts
