"""Check the places of a study: a file system, an object store, a database."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from drtune_ray.doctor.check_nodes import MIN_DISK_BYTES, size_text
from drtune_ray.doctor.findings import Doubt
from drtune_ray.doctor.node_probe import space
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.shared_storage import SharedPlace, shared_token
from drtune_ray.folders import LocalFolder, check_folder, open_folder, probe_folder
from drtune_ray.storage.optuna_storage import database_as_problem, open_storage, open_study

OTHERS_MAY_WRITE = 0o022


@dataclass(frozen=True)
class Places:
    """Places where a study is kept.

    Attributes:
        storage: Folder for all output.
        artifacts: URI of what nodes and the next driver need; None keeps it in the storage.
        optuna_storage: URL of the search's database; None keeps it in the storage.
    """

    storage: Path
    artifacts: str | None
    optuna_storage: str | None

    def check_storage(self) -> str:
        """Check that this machine can write to the storage and read from it.

        Raises:
            EnvironmentProblem: If not.
        """
        name, problem = probe_folder(LocalFolder(self.storage))
        if problem:
            raise EnvironmentProblem(
                f"{self.storage / name} {problem}: give a --storage that this user may write to"
            )
        return f"{self.storage} can be written and read"

    def check_owner(self) -> str:
        """Check that only this user can change the content of the storage.

        Raises:
            Doubt: If others can.
        """
        status = self.storage.stat()
        if status.st_uid != os.geteuid():
            raise Doubt(
                f"{self.storage} belongs to user {status.st_uid}, who can change every result "
                "there; none of it is executed as code"
            )
        if status.st_mode & OTHERS_MAY_WRITE:
            raise Doubt(
                f"other users may write to {self.storage} and change every result there; none of "
                f"it is executed as code; `chmod go-w {self.storage}` restricts it to you"
            )
        return "no other user may write to the storage"

    def check_space(self) -> str:
        """Check that the storage has free space.

        Raises:
            EnvironmentProblem: If there is too little.
        """
        free = space(self.storage).free
        if free < MIN_DISK_BYTES:
            raise EnvironmentProblem(
                f"{self.storage}: {size_text(free)} free, but at least {size_text(MIN_DISK_BYTES)} "
                "needed: free space there (`drtune-ray preview` shows what a study needs)"
            )
        return f"{size_text(free)} free under the storage"

    def check_shared(self) -> str:
        """Check that every node reads what this process writes there, and vice versa.

        Raises:
            EnvironmentProblem: If a node does not, naming each.
        """
        name = f".doctor-{uuid.uuid4().hex}"
        artifacts = open_folder(self.artifacts).below(name) if self.artifacts else None
        place = SharedPlace(self.storage / name, artifacts)
        try:
            with shared_token(place):
                return f"every node reads and writes the {_named(self)}"
        finally:
            for folder in (place.files, LocalFolder(place.folder)):
                if isinstance(folder, LocalFolder):
                    shutil.rmtree(folder.path, ignore_errors=True)

    def check_artifacts(self) -> str:
        """Check that this machine can write, read and remove artifacts.

        Raises:
            ConfigError: If the URI is of an unknown kind.
            EnvironmentProblem: If they cannot.
        """
        assert self.artifacts is not None
        check_folder(open_folder(self.artifacts))
        return f"{self.artifacts} can be written, read and removed"

    def check_database(self) -> str:
        """Check that the database accepts a study; Optuna creates missing tables.

        Raises:
            ConfigError: If the URL is not valid.
            EnvironmentProblem: If the database fails.
        """
        url = self.optuna_storage
        storage = open_storage(self.storage, url)
        with database_as_problem(url):
            study = open_study(storage, f"doctor-{uuid.uuid4().hex}")
            storage.delete_study(study._study_id)
        return f"{url} accepts studies"

    @contextmanager
    def left_as_they_were(self) -> Iterator[None]:
        """Remove a storage folder that the checks within created."""
        existed = self.storage.exists()
        try:
            yield
        finally:
            if not existed:
                with suppress(OSError):
                    self.storage.rmdir()


def _named(places: Places) -> str:
    return f"artifacts {places.artifacts}" if places.artifacts else f"storage {places.storage}"
