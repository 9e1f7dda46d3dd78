"""Where a study is kept: on a file system, in an object store, in a database."""

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
    """Where a study is kept.

    Attributes:
        storage: Folder for everything written.
        artifacts: URI of what nodes and the next driver need, if not there.
        optuna_storage: URL of the search's database, if not there.
    """

    storage: Path
    artifacts: str | None
    optuna_storage: str | None

    def check_storage(self) -> str:
        """Whether the storage can be written and read here.

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
        """Whether only this user can change what lies there.

        Raises:
            Doubt: If others can.
        """
        status = self.storage.stat()
        if status.st_uid != os.geteuid():
            raise Doubt(
                f"{self.storage} belongs to user {status.st_uid}, who can change every result "
                "there; nothing of it is run as code"
            )
        if status.st_mode & OTHERS_MAY_WRITE:
            raise Doubt(
                f"others may write to {self.storage} and change every result there; nothing of it "
                f"is run as code; `chmod go-w {self.storage}` keeps it to you"
            )
        return "nobody else may write to the storage"

    def check_space(self) -> str:
        """Whether the storage has room.

        Raises:
            EnvironmentProblem: If there is little.
        """
        free = space(self.storage).free
        if free < MIN_DISK_BYTES:
            raise EnvironmentProblem(
                f"{self.storage}: {size_text(free)} free, at least {size_text(MIN_DISK_BYTES)} "
                "must be: free space there (`drtune-ray preview` says what a study takes)"
            )
        return f"{size_text(free)} free under the storage"

    def check_shared(self) -> str:
        """Whether every node finds there what this process wrote, and this one what they wrote.

        Raises:
            EnvironmentProblem: Naming the nodes that do not.
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
        """Whether the artifacts can be written, read and removed here.

        Raises:
            ConfigError: If the URI is of an unknown kind.
            EnvironmentProblem: If they cannot.
        """
        assert self.artifacts is not None
        check_folder(open_folder(self.artifacts))
        return f"{self.artifacts} can be written, read and cleaned"

    def check_database(self) -> str:
        """Whether the database takes a study; Optuna makes its tables where there are none.

        Raises:
            ConfigError: If the URL is not one.
            EnvironmentProblem: If it does not.
        """
        url = self.optuna_storage
        storage = open_storage(self.storage, url)
        with database_as_problem(url):
            study = open_study(storage, f"doctor-{uuid.uuid4().hex}")
            storage.delete_study(study._study_id)
        return f"{url} takes studies"

    @contextmanager
    def left_as_they_were(self) -> Iterator[None]:
        """Within, the storage may be made to look at it."""
        was_there = self.storage.exists()
        try:
            yield
        finally:
            if not was_there:
                with suppress(OSError):
                    self.storage.rmdir()


def _named(places: Places) -> str:
    return f"artifacts {places.artifacts}" if places.artifacts else f"storage {places.storage}"
