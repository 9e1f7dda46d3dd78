"""The address of a job server: whoever reaches one can run code there, and so can who listens."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from drtune_ray.errors import ConfigError

SHAPE = "http(s)://HOST:PORT, that of the cluster's dashboard"


def checked_address(address: str, *, insecure_http: bool) -> str:
    """The address as requests begin with it.

    Args:
        address: As a user gave it.
        insecure_http: Whether plain http may leave this machine.

    Raises:
        ConfigError: If it is none, or if others could read and change what is sent there.
    """
    parts = _parts(address)
    host = parts.hostname or ""
    if parts.scheme == "http" and not (insecure_http or is_loopback(host)):
        raise ConfigError(
            f"--address {address} is plain http to another machine: whoever is on the way reads "
            "the token and runs code on the cluster. Give https://, reach the server through "
            "`ssh -L` or `kubectl port-forward` at http://127.0.0.1:PORT, or add --insecure-http "
            "where you trust the whole network"
        )
    return address.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parts(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, a bracket too many
        is_valid = False
    if not is_valid:
        raise ConfigError(f"--address {address!r} is no job server's: give {SHAPE}")
    if "@" in parts.netloc or parts.query or parts.fragment:  # they may hold a secret
        raise ConfigError(
            f"--address takes no user, password, query or fragment: give {SHAPE}, and the token in "
            "RAY_AUTH_TOKEN or in a file"
        )
    return parts
