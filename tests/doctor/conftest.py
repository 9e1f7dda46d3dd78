"""A doctor whose findings are seen, for all tests of this folder."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from drtune_ray.doctor import examine as examine_module
from drtune_ray.doctor.findings import Finding
from drtune_ray.errors import EnvironmentProblem

Examined = dict[str, tuple[str, str]]


@pytest.fixture
def closed_port() -> Any:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def examined(closed_port: str) -> Callable[..., Examined]:
    """State and text of each check, where no Ray cluster is reached."""

    def examine(**values: Any) -> Examined:
        found: list[Finding] = []
        setup = examine_module.named_setup(values, closed_port)
        with pytest.raises(EnvironmentProblem):
            examine_module.examine(setup, found.append)
        return {finding.check: (finding.state.value, finding.text) for finding in found}

    return examine
