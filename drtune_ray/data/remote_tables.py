"""Prepared tables in artifacts, for nodes that share no file system with the driver."""

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
    """Tables in a folder, under their names in a `TableStore`, each with its seal.

    The file name of a table contains its checksum, and the seal names the current one. Two drivers
    that upload different bytes under one table name at the same time therefore do not mix them.

    Args:
        folder: Folder of the tables.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    @property
    def address(self) -> str:
        """Address of the folder, for messages."""
        return self._folder.address("")

    def fetch(self, name: str, path: Path) -> bool:
        """Copy a table to a path; return whether it existed and was sound."""
        try:
            seal = self._folder.read(_seal_name(name))
            self._folder.download(_file_name(name, seal), path)
        except (FileNotFoundError, ValueError, KeyError):  # missing, or not one of our seals
            return False
        seal_of(path).write_bytes(seal)
        if problem := damage(path):
            logger.warning("%s %s", self._folder.address(_file_name(name, seal)), problem)
            path.unlink()
        return problem is None

    def put(self, path: Path) -> None:
        """Upload a table unless it exists. The seal is written last, once the table is complete.

        Raises:
            OSError: If the upload fails.
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
    """Provide all tables on this node, at the driver's paths, until this process ends.

    Raises:
        EnvironmentProblem: If a table is neither on this node nor on the shelf.
    """
    paths = [tables.backbone, tables.images, tables.views, tables.evaluation, tables.features]

    def missing(path: Path) -> None:
        raise EnvironmentProblem(
            f"the prepared table {path.name} is neither on this node nor at {shelf.address}: check "
            "that all nodes can reach the same artifacts"
        )

    # No limit here: a trial may need any of the tables. The driver keeps its own node's limit.
    store = TableStore(tables.images.parent.parent, math.inf, shelf)
    store.__enter__()
    for path in paths:
        if path is not None:
            store.table(path.name, missing)


def _seal_name(name: str) -> str:
    return f"{name}.seal"


def _file_name(name: str, seal: bytes) -> str:
    return f"{name}.{json.loads(seal)['crc32']:08x}"
