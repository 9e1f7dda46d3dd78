from __future__ import annotations

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.jobs.address import checked_address


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8265",
        "http://127.8.9.10:8265",
        "http://localhost:8265",
        "http://[::1]:8265",
        "https://ray.example.org",
        "https://ray.example.org:443/clusters/one",
    ],
)
def test_checked_address__allowed(address: str) -> None:
    assert checked_address(address, insecure_http=False) == address
    assert checked_address(f"{address}/", insecure_http=False) == address


@pytest.mark.parametrize(
    "host", ["10.0.0.7", "ray.example.org", "0.0.0.0", "localhost.example.org", "127.0.0.1.example"]
)
def test_checked_address__plain_http_to_another_machine(host: str) -> None:
    address = f"http://{host}:8265"
    with pytest.raises(ConfigError) as caught:
        checked_address(address, insecure_http=False)
    assert str(caught.value) == (
        f"--address {address} is plain http to another machine: whoever is on the way reads the "
        "token and runs code on the cluster. Give https://, reach the server through `ssh -L` or "
        "`kubectl port-forward` at http://127.0.0.1:PORT, or add --insecure-http where you trust "
        "the whole network"
    )
    assert checked_address(address, insecure_http=True) == address


@pytest.mark.parametrize(
    "address",
    ["", "auto", "10.0.0.7:6379", "ray://head:10001", "http://", "http://a:port", "http://[a"],
)
def test_checked_address__none(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_address(address, insecure_http=True)
    assert str(caught.value) == (
        f"--address {address!r} is no job server's: give http(s)://HOST:PORT, that of the "
        "cluster's dashboard"
    )


@pytest.mark.parametrize(
    "address",
    ["https://me:secret@host", "https://secret@host", "https://h?token=secret", "https://h#secret"],
)
def test_checked_address__shows_no_secret(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_address(address, insecure_http=False)
    assert str(caught.value) == (
        "--address takes no user, password, query or fragment: give http(s)://HOST:PORT, that of "
        "the cluster's dashboard, and the token in RAY_AUTH_TOKEN or in a file"
    )
