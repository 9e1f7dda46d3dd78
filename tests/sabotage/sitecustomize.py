"""Failures on order, for processes that find this folder on PYTHONPATH; nothing of it is shipped.

``SABOTAGE`` names a folder. A file ``hang@2`` in it makes the first process that trains a step of
its third epoch hang; who takes an order removes the file. ``hold@30`` stays: every process waits
before a step of its 31st epoch or a later one. Every step and epoch that is trained is written into
``trained`` in that folder, after ``SABOTAGE_STEP_SECONDS``. A file ``hurry`` ends both waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from typing import Any

TARGET = "drtune_ray.training.trial"


def _hog() -> None:
    """Take memory until Ray's monitor ends this process: at most 4 GiB, and not the last one."""
    import psutil

    held: list[bytearray] = []
    while len(held) < 32 and psutil.virtual_memory().available > 2**30:
        held.append(bytearray(b"x") * 2**27)
        time.sleep(0.05)
    time.sleep(60)


def _exhaust() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory")


ACTIONS = {
    "exhaust": _exhaust,
    "hang": lambda: time.sleep(3600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hog": _hog,
}


def _act(epoch: int) -> None:
    for order in os.listdir(os.environ["SABOTAGE"]):
        what, _, when = order.partition("@")
        if what in ACTIONS and int(when.partition(".")[0]) == epoch:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(os.environ["SABOTAGE"], order))
                ACTIONS[what]()


def _wait(epoch: int) -> None:
    folder = os.environ["SABOTAGE"]
    seconds = float(os.environ.get("SABOTAGE_STEP_SECONDS", "0.03"))
    is_first = True
    while not os.path.exists(os.path.join(folder, "hurry")) and (is_first or _is_held(epoch)):
        time.sleep(seconds)
        is_first = False


def _is_held(epoch: int) -> bool:
    held = (name.partition("@") for name in os.listdir(os.environ["SABOTAGE"]))
    return any(what == "hold" and int(when) <= epoch for what, _, when in held)


def _record(trial: Any, what: str) -> None:
    if trial.group.rank:
        return
    values = trial.config.to_mapping()
    del values["training"]["workers"]  # may change from run to run
    config = json.dumps(values, sort_keys=True)
    progress = trial.progress
    entry = [
        what,
        hashlib.sha256(config.encode()).hexdigest(),
        progress.epochs_done,
        progress.steps_done,
        time.time(),
    ]
    with open(os.path.join(os.environ["SABOTAGE"], "trained"), "a") as file:
        file.write(json.dumps(entry) + "\n")


def _sabotage(module: Any) -> None:
    trial = module.Trial
    update, finish = trial._update, trial.finish_epoch

    def slow_update(self: Any, loss: Any) -> None:
        _act(self.progress.epochs_done)
        _wait(self.progress.epochs_done)
        update(self, loss)
        _record(self, "step")

    def told_finish(self: Any) -> None:
        _record(self, "epoch")
        finish(self)

    trial._update, trial.finish_epoch = slow_update, told_finish


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _sabotage(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "SABOTAGE" in os.environ:
    sys.meta_path.insert(0, _Finder())
