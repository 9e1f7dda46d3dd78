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
    message = str(caught.value)
    assert message.startswith(f"--address {address} uses plain http")
    for way_out in ("https://", "`ssh -L`", "`kubectl port-forward`", "--insecure-http"):
        assert way_out in message
    assert checked_address(address, insecure_http=True) == address


@pytest.mark.parametrize(
    "address",
    ["", "auto", "10.0.0.7:6379", "ray://head:10001", "http://", "http://a:port", "http://[a"],
)
def test_checked_address__none(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_address(address, insecure_http=True)
    assert str(caught.value).startswith(f"--address {address!r} ")
    assert "give http(s)://HOST:PORT" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["https://me:secret@host", "https://secret@host", "https://h?token=secret", "https://h#secret"],
)
def test_checked_address__shows_no_secret(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_address(address, insecure_http=False)
    assert "secret" not in str(caught.value)
    assert "give http(s)://HOST:PORT" in str(caught.value)
    assert "RAY_AUTH_TOKEN" in str(caught.value)
