"""Copies of a model: in a folder, and on a hub, for which a small server stands in."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import drtune_ray
from drtune_ray.cli import cli
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.study.pushing import push_model
from tests import past_studies


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return past_studies.install(tmp_path_factory.mktemp("pushing"))


def test_push__to_a_folder(study: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "flowers"
    assert push_model(study.name, str(target), str(study.parent)) == str(target)
    wanted = {path.name: path.read_bytes() for path in (study / "winner").iterdir()}
    assert {path.name: path.read_bytes() for path in target.iterdir()} == wanted
    assert drtune_ray.load(target).about == drtune_ray.load(study).about
    (target / "README.md").write_text("older")
    (target / "old.txt").write_text("of an earlier release")
    cli(["push", str(study), str(target)], standalone_mode=False)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == wanted
    assert [path.name for path in target.parent.iterdir()] == ["flowers"]


def test_push__leaves_other_folders_alone(study: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files: give a new folder"):
        push_model(str(study), str(tmp_path), "")
    with pytest.raises(ConfigError, match="thesis.txt is a file: give a folder"):
        push_model(str(study), str(tmp_path / "thesis.txt"), "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_push__a_damaged_model_stays(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(study / "winner", folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(EnvironmentProblem, match="holds no whole model"):
        push_model(str(folder), str(tmp_path / "new"), "")
    assert not (tmp_path / "new").exists()


class Hub(ThreadingHTTPServer):
    """The few answers of the hub that an upload needs; keeps what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: list[dict[str, Any]] = []
        self.files: dict[str, str] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self._answer(403, {"error": "no right to write"})
        elif self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            self._answer(200, {"url": f"{self.server.address}/me/flowers", "name": "me/flowers"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            regular = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self._answer(200, {"files": regular})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = line["value"]["content"]
            self._answer(
                200,
                {"success": True, "commitOid": "a1", "commitUrl": f"{self.server.address}/c/a1"},
            )
        else:
            self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/flowers", "siblings": [], "sha": "a0", "name": "me"})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, hf_api

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # As HF_ENDPOINT and HF_TOKEN, which the library reads when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(hf_api, "ENDPOINT", server.address, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push__to_a_hub_in_one_private_repository(study: Path, hub: Hub) -> None:
    import base64

    push_model(str(study), "hf://me/flowers", "")
    (made,) = hub.repositories
    assert (made["name"], made["organization"]) == ("flowers", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    sent = {name: base64.b64decode(content) for name, content in hub.files.items()}
    assert sent == {path.name: path.read_bytes() for path in (study / "winner").iterdir()}
    assert hub.tokens == {"Bearer hf_secret"}


def test_push__a_hub_that_refuses(study: Path, hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(EnvironmentProblem, match="does not take me/flowers .*403") as error:
        push_model(str(study), "hf://me/flowers", "")
    assert "hf_secret" not in str(error.value)
    assert not hub.files
