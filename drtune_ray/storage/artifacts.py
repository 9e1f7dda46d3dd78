"""Files of a study that outlive its driver's disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drtune_ray.data.remote_tables import RemoteTables
from drtune_ray.data.table_store import CACHE_FOLDER
from drtune_ray.errors import ConfigError, first_line
from drtune_ray.folders import Folder, check_folder, open_folder
from drtune_ray.folders import as_problem as as_problem
from drtune_ray.storage.lease import BEAT_SECONDS, LEASE_NAME, Lease, artifacts_lease, repeated
from drtune_ray.storage.record import (
    DONE_NAME,
    RECORD_FILE,
    SPOOL_NAME,
    TRIALS_FOLDER,
    TRIALS_NAME,
    WINNER_NAME,
    Record,
    read_record,
)
from drtune_ray.tracking.spool import Spool

logger = logging.getLogger(__name__)
UNSENT_NAME = "unsent-events.jsonl"


class StudyArtifacts:
    """The files of a study or training that outlive the driver's disk.

    The URI holds one folder a study, laid out as under the storage, and what studies share:
    ``cache`` with the prepared tables, and ``splits``. Without a URI every file stays under the
    storage and each method does nothing.

    Args:
        uri: URI of the artifacts of all studies; None keeps everything under the storage.
        folder: The study's folder under the storage.

    Raises:
        ConfigError: If the URI's scheme is unknown.
        EnvironmentProblem: If the location cannot be written to.
    """

    def __init__(self, uri: str | None, folder: Path) -> None:
        self.uri, self._local = uri, folder
        self.root: Folder | None = open_folder(uri) if uri else None
        self._study = self.root.below(folder.name) if self.root else None
        self._lease: Lease | None = None
        if self.root:
            check_folder(self.root)

    @property
    def trials(self) -> Folder | None:
        """Folder that holds one folder a trial; None without artifacts."""
        return self._study.below(TRIALS_FOLDER) if self._study else None

    @property
    def shelf(self) -> RemoteTables | None:
        """Store of the prepared tables; None without artifacts."""
        return RemoteTables(self.root.below(CACHE_FOLDER)) if self.root else None

    def restore_shared(self, path: Path) -> None:
        """Download a file that all studies share, if the storage lacks it."""
        if self.root and not path.exists():
            with as_problem(self.uri):
                folder = self.root.below(path.parent.name)
                if path.name in folder.names():
                    folder.download(path.name, path)

    def keep_shared(self, path: Path) -> None:
        """Upload a file that all studies share."""
        if self.root:
            with as_problem(self.uri):
                self.root.below(path.parent.name).upload(path, path.name)

    def restore(self) -> bool:
        """Download the study if this disk holds nothing of it; return whether it was downloaded.

        Raises:
            ConfigError: If the artifacts hold another study of this name.
        """
        if (self._local / RECORD_FILE).exists():
            self._check_same(read_record(self._local))
            return False
        if self._study is None:
            return False
        with as_problem(self.uri):
            names = self._study.names()
            if RECORD_FILE not in names:
                return False
            winner = self._study.below(WINNER_NAME)
            for name in winner.names():
                winner.download(name, self._local / WINNER_NAME / name)
            # The record last: a restoration that is cut short begins again.
            for name in sorted(names, key=lambda name: name == RECORD_FILE):
                if name == UNSENT_NAME:
                    Spool(self._local / SPOOL_NAME).restore(self._study.read(name))
                elif name != LEASE_NAME:
                    self._study.download(name, self._local / name)
        logger.warning("study %r was brought back from %s", self._local.name, self.uri)
        return True

    def has_trials(self) -> bool:
        """Return whether this disk or the artifacts hold anything of the study's trials."""
        ends = {DONE_NAME, TRIALS_NAME}
        trials = self._local / TRIALS_FOLDER
        if trials.is_dir() and any(trials.iterdir()):
            return True
        if any((self._local / name).exists() for name in ends):
            return True
        if self._study is None:
            return False
        with as_problem(self.uri):
            has_ended = not ends.isdisjoint(self._study.names())
            return has_ended or bool(self._study.below(TRIALS_FOLDER).folders())

    def keep(self, *names: str) -> None:
        """Upload files and folders of the study's folder, in the order given.

        Raises:
            EnvironmentProblem: If another driver has taken the study over.
        """
        if self._study is None:
            return
        self.check_lease()
        with as_problem(self.uri):
            for name in names:
                path = self._local / name
                if not path.is_dir():
                    self._study.upload(path, name)
                    continue
                for file in sorted(path.iterdir()):
                    self._study.below(name).upload(file, file.name)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the lease that makes this process the study's only driver on any machine."""
        if self._study is None:
            yield
            return
        with artifacts_lease(self._study, self._local.name) as self._lease:
            try:
                yield
            finally:
                self._lease = None

    def check_lease(self) -> None:
        """Raise if this process is no longer the study's only driver; call it often.

        Raises:
            EnvironmentProblem: If another driver has taken it over, or may have.
        """
        if self._lease is not None:
            self._lease.check()

    @contextmanager
    def unsent_kept(self, spool: Spool) -> Iterator[None]:
        """Upload the events that MLflow has not received yet when the block ends."""
        if (study := self._study) is None:
            yield
            return
        kept = [b"not known"]

        def keep() -> None:
            unsent = spool.unsent()
            if unsent == kept[0]:
                return
            self.check_lease()
            with as_problem(self.uri):
                study.write(UNSENT_NAME, unsent) if unsent else study.remove(UNSENT_NAME)
            kept[0] = unsent

        try:
            with repeated(BEAT_SECONDS, keep):
                yield
        except BaseException:
            with _only_logged():  # what ended the study matters more
                keep()
            raise
        keep()

    def _check_same(self, former: Record) -> None:
        there = None
        if self._study is not None:
            with as_problem(self.uri):
                if RECORD_FILE in self._study.names():
                    there = self._study.read(RECORD_FILE).decode()
        is_same = there is not None and f"study_id: {former.study_id}\n" in there
        if is_same or (there is None and former.artifacts == self.uri):
            return
        raise ConfigError(
            f"study {former.folder.name!r} keeps its checkpoints in artifacts="
            f"{place_text(former.artifacts)}, and {place_text(self.uri)} does not hold them: give "
            "the former one, or copy the study's folder there first"
        )


def place_text(uri: str | None) -> str:
    """Return a location as messages name it."""
    return repr(uri) if uri else "none (the study's folder)"


@contextmanager
def _only_logged() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning("artifacts: %s", first_line(error))
