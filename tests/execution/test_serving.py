"""A served model: real requests, many at once; what it refuses."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import drtune_ray
from drtune_ray.errors import ConfigError
from drtune_ray.execution.serving import TOKEN_VARIABLE, check_place, served
from tests import past_studies
from tests.leftovers import free_port

SECRET = "a secret of my choice"


def test_check_place__other_machines_need_a_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_place(host, has_token=False)
    check_place("0.0.0.0", has_token=True)
    for host in ("0.0.0.0", "192.168.1.7", "::", "example.org"):
        with pytest.raises(ConfigError, match=f"--host {host} lets other machines ask"):
            check_place(host, has_token=False)


def test_build__a_service_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from drtune_ray.execution.serve_app import build

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="DRTUNE_SERVE_TOKEN is not set"):
        build({"model": "flowers"})
    with pytest.raises(ConfigError, match="did you mean 'args.batch_size'"):
        build({"model": "flowers", "batch_sise": 3})


def test_build__the_token_itself_is_not_sent_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cloudpickle import dumps

    from drtune_ray.execution.serve_app import build

    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    assert SECRET.encode() not in dumps(build({"model": "flowers"}))


def ask(address: str, body: bytes, token: str = SECRET, kind: str = "image/bmp") -> Any:
    headers = {"Content-Type": kind, "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(address, body, headers)
    with urllib.request.urlopen(request, timeout=300) as found:
        return json.load(found)


def refusal(address: str, body: bytes | None, **options: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as refused:
        if body is None:
            authorization = {"Authorization": f"Bearer {SECRET}"}
            request = urllib.request.Request(address, headers=authorization)
            urllib.request.urlopen(request, timeout=300)
        else:
            ask(address, body, **options)
    refused.value.close()
    return refused.value.code


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return past_studies.install(tmp_path)


@pytest.fixture
def address(study: Path, shared_ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    with served(str(study / "winner"), "127.0.0.1", free_port(), batch_size=8) as found:
        yield found


@pytest.mark.ray
@pytest.mark.slow
def test_served__many_requests_at_once(study: Path, address: str) -> None:
    """One story, since it starts Ray Serve."""
    paths = sorted((study.parents[1] / "images").rglob("*.bmp"))
    own = drtune_ray.load(study).predict(paths)
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda path: ask(address, path.read_bytes()), paths * 3))
    for each, wanted in zip(found, own * 3, strict=True):
        assert each["label"] == wanted.label
        assert each["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-4)

    texts = [base64.b64encode(content).decode() for content in (paths[0].read_bytes(), b"no image")]
    body = json.dumps({"images": texts}).encode()
    good, bad = ask(address, body, kind="application/json")["predictions"]
    assert good["label"] == own[0].label
    assert bad == {"error": "no image that Pillow decodes (not recognised as an image)"}

    image = paths[0].read_bytes()
    assert refusal(address, image, token="another") == 401
    assert refusal(address, image, token="") == 401
    assert refusal(address, b"no image") == 400
    assert refusal(address, b'{"images": "/etc/passwd"}', kind="application/json") == 400
    assert refusal(address, b"[", kind="application/json") == 400
    assert refusal(address, None) == 405
    assert refusal(address, bytes(64 * 2**20 + 1)) == 413
    with urllib.request.urlopen(f"{address}-/healthz", timeout=300) as healthy:
        assert healthy.status == 200

    with Image.open(paths[0]) as picture:
        picture.save(study / "one.png")
    again = ask(address, (study / "one.png").read_bytes(), kind="image/png")
    assert again["probabilities"] == pytest.approx(own[0].probabilities, abs=1e-4)
