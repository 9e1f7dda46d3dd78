"""Prepared tables in artifacts, for nodes that have no file system in common with the driver."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from drtune_ray.data.dataset import Tables
from drtune_ray.data.table_store import TableStore, damage, seal_of
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import Folder

logger = logging.getLogger(__name__)


class RemoteTables:
    """Tables under the names that they have in a `TableStore`, each with its seal.

    A table's file carries its checksum in its name and the seal says which it is, so that two
    drivers that put other bytes under one name at a time do not mix them.

    Args:
        folder: Holds them.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    @property
    def address(self) -> str:
        """Where the tables lie, for people."""
        return self._folder.address("")

    def fetch(self, name: str, path: Path) -> bool:
        """Copy the table of this name to a path; whether it was there, and sound."""
        try:
            seal = self._folder.read(_seal_name(name))
            self._folder.download(_file_name(name, seal), path)
        except (FileNotFoundError, ValueError, KeyError):  # none, or no seal of ours
            return False
        seal_of(path).write_bytes(seal)
        if problem := damage(path):
            logger.warning("%s %s", self._folder.address(_file_name(name, seal)), problem)
            path.unlink()
        return problem is None

    def put(self, path: Path) -> None:
        """Take a table, unless it is there. Its seal comes last: it says that the table is there.

        Raises:
            OSError: If it cannot be written.
        """
        name, seal = path.name, seal_of(path).read_bytes()
        try:
            if self._folder.read(_seal_name(name)) == seal:
                return
        except FileNotFoundError:
            pass
        self._folder.upload(path, _file_name(name, seal))
        self._folder.write(_seal_name(name), seal)


def fetch_tables(tables: Tables, shelf: RemoteTables) -> None:
    """Have all tables on this node, at the paths of the driver's, until this process ends.

    Raises:
        EnvironmentProblem: If one is neither here nor on the shelf.
    """
    paths = [tables.backbone, tables.images, tables.views, tables.evaluation, tables.features]

    def missing(path: Path) -> None:
        raise EnvironmentProblem(
            f"the prepared table {path.name} is neither on this node nor at {shelf.address}: do "
            "all nodes reach the same artifacts?"
        )

    # The driver keeps the limit of its own node; here nothing is removed that a trial may need.
    store = TableStore(tables.images.parent.parent, math.inf, shelf)
    store.__enter__()
    for path in paths:
        if path is not None:
            store.table(path.name, missing)


def _seal_name(name: str) -> str:
    return f"{name}.seal"


def _file_name(name: str, seal: bytes) -> str:
    return f"{name}.{json.loads(seal)['crc32']:08x}"
