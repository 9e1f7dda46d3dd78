"""The doctor of real Ray clusters: tokens, a node that is odd in every way, no dashboard."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from drtune_ray.doctor.check_ray import COPY, OPEN
from drtune_ray.doctor.clock_skew import FIX as CLOCK_FIX
from tests.clusters import ray_node
from tests.execution.test_shared import can_mount
from tests.leftovers import free_port
from tests.servers import object_store
from tests.small import BACKBONE, write_coloured

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("doctor-ray")]

BIN = Path(sys.executable).parent
ODD = str(Path(__file__).with_name("odd"))
TOKEN = secrets.token_hex(32)
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def variables(**more: str) -> dict[str, str]:
    """Of the environment, without what may name a cluster or a token of this machine's user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0", "HOME": "/nonexistent"} | more


@contextmanager
def ray_head(folder: Path, *options: str, **environment: str) -> Iterator[str]:
    """A head on the loopback; yields its address."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    # Sockets have short paths.
    sessions = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    if not can_mount(folder):
        pytest.skip("no mount namespaces here")
    started = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={sessions}"]
    try:
        with ray_node(
            folder / "head.log", *started, *options, environment=variables(**environment)
        ) as head:
            wait_for_port(address, head, folder / "head.log")
            yield address
    finally:
        shutil.rmtree(sessions, ignore_errors=True)


def wait_for_port(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        try:
            return socket.create_connection((host, int(port)), 1).close()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def sessions_of(address: str) -> str:
    """Where Ray's nodes write: all of them where the head does."""
    script = (
        "import sys, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
        "print(ray._private.worker.global_worker.node.get_temp_dir_path())"
    )
    command = [sys.executable, "-c", script, address]
    told = subprocess.run(
        command, env=variables(**WITH_TOKEN), check=True, timeout=90, capture_output=True, text=True
    )
    return told.stdout.split()[-1]


def wait_for_nodes(address: str, number: int) -> None:
    """In another process: this one may join one cluster with one token only."""
    script = (
        "import sys, time, ray; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR')\n"
        "while sum(n['Alive'] for n in ray.nodes()) < int(sys.argv[2]): time.sleep(0.2)"
    )
    command = [sys.executable, "-c", script, address, str(number)]
    subprocess.run(command, env=variables(**WITH_TOKEN), check=True, timeout=90)


Found = dict[str, tuple[str, str]]


def examined(*arguments: str, expected: int = 3, **environment: str) -> Found:
    """State and text of each check, as the command tells them."""
    done = subprocess.run(
        [str(BIN / "drtune-ray"), "doctor", "--json", *arguments],
        env=variables(**environment),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    *checks, result = map(json.loads, done.stdout.splitlines())
    assert (result["kind"], result["exit_code"]) == ("result", expected)
    assert {check["kind"] for check in checks} == {"check"}
    return {check["check"]: (check["state"], check["text"]) for check in checks}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of one node that asks for a token."""
    dashboard = f"--dashboard-port={free_port()}"
    with ray_head(tmp_path_factory.mktemp("head"), dashboard, **WITH_TOKEN) as address:
        wait_for_nodes(address, 1)
        yield address


# ---- before it is joined


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        (
            {},
            f"the cluster requires a token, and none is sent: set RAY_AUTH_MODE=token, and {COPY}",
        ),
        (
            {"RAY_AUTH_MODE": "token"},
            "RAY_AUTH_MODE=token is set, but there is no token in RAY_AUTH_TOKEN, in the file of "
            f"RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token: {COPY}",
        ),
    ],
    ids=["none", "mode alone"],
)
def test_a_token_that_is_not_the_clusters(
    head: str, tmp_path: Path, environment: dict[str, str], text: str
) -> None:
    start = time.monotonic()
    found = examined("--address", head, "--storage", str(tmp_path), **environment)
    assert found["ray address"] == ("ok", f"{head} answers")
    assert found["ray token"] == ("failed", text)
    assert found["ray"] == ("skipped", "needs 'ray token', which failed")
    assert found["nodes"] == ("skipped", "needs 'ray', which was skipped")
    assert found["storage"][0] == "ok"
    assert time.monotonic() - start < 60  # Ray alone takes 20 s longer
    assert not any(TOKEN in text for _, text in found.values())


def test_a_wrong_token_is_named_by_its_file(head: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("f" * 64)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    found = examined("--address", head, "--storage", str(tmp_path), **environment)
    text = f"the cluster rejects the token from {tmp_path}/token: {COPY}"
    assert found["ray token"] == ("failed", text)


def test_addresses_of_no_cluster(closed_port: str, tmp_path: Path) -> None:
    found = examined("--address", closed_port, "--storage", str(tmp_path))
    text = f"{closed_port}: nothing answers there (Connection refused)"
    assert found["ray address"] == ("failed", text)
    with object_store() as store:
        address = store["AWS_ENDPOINT_URL"].removeprefix("http://")
        found = examined("--address", address, "--storage", str(tmp_path))
    assert found["ray token"] == (
        "failed",
        f"{address} does not answer as the head of a Ray cluster (UNAVAILABLE): give the address "
        "that `ray start --head` prints",
    )


# ---- joined


def test_a_sound_cluster(head: str, tmp_path: Path, weights_file: Any) -> None:
    images, weights = write_coloured(tmp_path / "images", 6), weights_file(BACKBONE)
    arguments = ["--data", str(images), "--backbone", BACKBONE, "--weights", str(weights)]
    storage = tmp_path / "studies"
    found = examined(
        "--address", head, "--storage", str(storage), *arguments, expected=0, **WITH_TOKEN
    )
    assert {state for state, _ in found.values()} == {"ok"}, found
    text = "the token from RAY_AUTH_TOKEN is accepted, requests without a token are refused"
    assert found["ray token"][1] == text
    assert found["ray state api"][1] == "answers"
    assert found["trials"][1] == "1 at a time"
    assert found["nodes"][1] == "drtune-ray ran on 1"
    assert re.fullmatch(r"at most 0\.[0-2] s apart", found["clocks"][1])
    assert found["gpus"][1] == "none"
    assert found["data on nodes"][1] == f"{images} is readable on all 1"
    assert found["weights on nodes"][1] == f"{weights} is readable on all 1"
    assert found["shared files"][1] == f"every node reads and writes the storage {storage}"
    assert not storage.exists()


def test_a_node_that_is_odd_in_every_way(head: str, tmp_path: Path) -> None:
    """Each failure is told, none hides another, and the sound node is not named."""
    storage, images = tmp_path / "studies", write_coloured(tmp_path / "images", 6)
    storage.mkdir()
    mounted = (
        f"mount -t tmpfs none {storage} && mount -t tmpfs none {images} && "
        "mount -t tmpfs -o size=32m none /dev/shm && "
        f"mount -t tmpfs -o size=600m none {sessions_of(head)}"
    )
    odd = {"ODD": "clock,versions", "PYTHONPATH": f"{ODD}:{os.environ.get('PYTHONPATH', '')}"}
    options = [f"--address={head}", "--num-gpus=1"]
    environment = variables(**odd, **WITH_TOKEN)
    with ray_node(tmp_path / "node.log", *options, mounted=mounted, environment=environment):
        wait_for_nodes(head, 2)
        token = tmp_path / "auth_token"
        token.write_text(TOKEN)
        token.chmod(0o644)  # as Ray writes it
        found = examined(
            *("--address", head, "--storage", str(storage), "--data", str(images)),
            *("--weights", "demo"),
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
        )
    assert found["nodes"] == ("ok", "drtune-ray ran on 2")
    assert found.pop("ray token") == (
        "warning",
        f"the token is accepted, but other users can read {token}, and who has the token can run "
        f"code on the cluster: `chmod go= {token}` restricts it to you",
    )
    texts = {}
    for check, (state, text) in found.items():
        if state != "ok":
            told, num_nodes = re.subn(r"node [\d.]+ \(\w{8}\)", "NODE", text)
            assert num_nodes == 1, text
            texts[check] = state, told
    clock = re.sub(r"3[56]\d\d\.\d", "3600", texts.pop("clocks")[1])
    assert clock == f"NODE: its clock is 3600 s ahead of this machine's; {CLOCK_FIX}"
    shared_memory = re.sub(r"0\.0\d", "0.03", texts.pop("shared memory")[1])
    assert shared_memory == (
        "NODE: 0.03 GiB free, but at least 0.25 GiB needed; give the container more: --shm-size in "
        "docker, an emptyDir of medium Memory at /dev/shm in Kubernetes"
    )
    disk = re.sub(r"0\.[45]\d", "0.58", texts.pop("ray disk")[1])
    assert disk == (
        "NODE: 0.58 GiB free, but at least 1.00 GiB needed; free space where Ray keeps its "
        "sessions (/tmp/ray), or start Ray with another --temp-dir"
    )
    files = re.sub(r"\.doctor-\w+", ".doctor", texts.pop("shared files")[1])
    assert files == (
        f"the storage {storage} does not serve every node of the cluster: NODE: cannot read what "
        f"the driver wrote in {storage}/.doctor: No such file or directory; put --storage on a "
        "file system that every node mounts at the same path (NFS, Lustre, EFS, a ReadWriteMany "
        "volume), and drtune-ray of the same version on every node"
    )
    assert texts == {
        "versions": (
            "failed",
            f"NODE: has Python 3.0.1, here {platform.python_version()}, torch 1.0.1, here "
            f"{torch.__version__.partition('+')[0]}; install the same versions on every node, "
            "preferably from one image",
        ),
        "gpus": (
            "failed",
            "NODE: Ray counts 1 GPUs, torch can use 0; install a torch build for the CUDA version "
            "of the node's driver, or start Ray there with the correct --num-gpus",
        ),
        "data on nodes": (
            "warning",
            f"NODE: cannot read {images} (it holds no file); workers read prepared tables "
            "instead, but a command that Ray starts there (`ray job submit`) needs it: mount it "
            "at the same path",
        ),
    }
    assert list(storage.iterdir()) == []


def test_a_node_without_the_package(head: str, tmp_path: Path) -> None:
    """The other node is looked at all the same."""
    odd = {"ODD": "bare", "PYTHONPATH": f"{ODD}:{os.environ.get('PYTHONPATH', '')}"}
    artifacts = (tmp_path / "artifacts").as_uri()
    environment = variables(**odd, **WITH_TOKEN)
    with ray_node(tmp_path / "node.log", f"--address={head}", environment=environment):
        wait_for_nodes(head, 2)
        found = examined(
            *("--address", head, "--storage", str(tmp_path / "s"), "--artifacts", artifacts),
            **WITH_TOKEN,
        )
    state, text = found["nodes"]
    assert state == "failed"
    assert re.fullmatch(
        r"node [\d.]+ \(\w{8}\): cannot run drtune-ray: .*drtune_ray.*; install the same versions "
        "of drtune-ray, Python and Ray on every node",
        text,
    ), text
    assert found["versions"][0] == found["clocks"][0] == "ok"
    state, text = found["shared files"]
    assert state == "failed"
    assert re.match(
        rf"the artifacts {tmp_path}/artifacts/\S+ does not serve every node of the cluster: node "
        r"[\d.]+ \(\w{8}\): cannot run drtune-ray: ",
        text,
    ), text
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_a_cluster_open_to_all_and_without_a_dashboard(tmp_path: Path, weights_file: Any) -> None:
    images, weights = write_coloured(tmp_path / "images", 6), weights_file(BACKBONE)
    study = tmp_path / "study.yaml"
    study.write_text(
        json.dumps(
            {
                "name": "small",
                "storage": str(tmp_path / "studies"),
                "trial": {
                    "data": {"train": str(images)},
                    "backbone": {"name": BACKBONE, "weights": str(weights)},
                    "training": {"workers": 2},
                },
                "resources": {"gpus_per_worker": 1},
            }
        )
    )
    with ray_head(tmp_path, "--include-dashboard=false", RAY_AUTH_MODE="disabled") as address:
        found = examined(str(study), "--address", address)
    assert found["ray token"] == ("warning", OPEN)
    assert found["ray"][0] == "ok"
    state, text = found["ray state api"]
    assert state == "failed"
    assert text.startswith(
        "trainings of several workers need the dashboard of the Ray cluster, which does not answer"
    )
    state, text = found["trials"]
    assert state == "failed"
    assert "2 x {CPU: 1, GPU: 1}" in text
    assert found["shared files"][0] == "ok"
