"""How the tests are divided among the processes of a test run: see docs/development.md."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest

# Modules with a test of the first marker run first: the longest tasks must not be left for the end.
LONGEST_FIRST = ("ray", "browser", "ddp", "slow")

# After so many seconds a test with Ray hangs: a story of kills takes minutes on a busy machine.
RAY_TIMEOUT_SECONDS = 1800


def order_groups(items: list[pytest.Item]) -> None:
    """Keep the tests of a module on one worker, and start with the modules that take longest.

    A module's fixtures (clusters, servers, process groups) then start once. A test that declares an
    `xdist_group` of its own keeps it.
    """
    turns: dict[str, int] = {}
    for item in items:
        module = module_of(item)
        turns[module] = min(turns.get(module, len(LONGEST_FIRST)), _turn(item))
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(module))
        if item.get_closest_marker("ray") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(RAY_TIMEOUT_SECONDS))
    items.sort(key=lambda item: turns[module_of(item)])


def module_of(item: pytest.Item) -> str:
    """Return the path of the module that a test is in."""
    return item.nodeid.partition("::")[0]


def _turn(item: pytest.Item) -> int:
    marks = (at for at, name in enumerate(LONGEST_FIRST) if item.get_closest_marker(name))
    return min(marks, default=len(LONGEST_FIRST))


def use_one_thread() -> None:
    """Set torch and NumPy to one thread: the tensors are tiny, and each core has a worker."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    with suppress(ImportError):  # it comes with scikit-learn, which a GPU machine may lack
        from threadpoolctl import threadpool_limits

        threadpool_limits(1, "blas")
