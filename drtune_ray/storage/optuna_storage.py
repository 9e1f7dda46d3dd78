"""The Optuna storage of a study: a journal file in its folder, or a database.

With a database, artifacts and an MLflow server, the driver's disk may be lost between two runs: the
next driver downloads what it needs and resumes. The nodes need no shared file system.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import StudyDirection
from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.storage.artifacts import StudyArtifacts, place_text
from drtune_ray.storage.journal import Rebuild, WholeJournal, repair_journal
from drtune_ray.storage.record import JOURNAL_NAME, RECORD_FILE, Record, read_record

DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
EXAMPLE = "postgresql+psycopg://USER:$PASSWORD@HOST/DATABASE"


def check_database(url: str | None) -> None:
    """Check the URL of a database before anything starts, without connecting to it.

    Raises:
        ConfigError: If it is no URL of a database, or names an unset environment variable.
        EnvironmentProblem: If the database's Python driver is not installed.
    """
    if url is not None:
        with _as_refusal(url):
            create_engine(with_secrets(url)).dispose()


def open_storage(
    folder: Path,
    url: str | None,
    directions: Sequence[str] = ("maximize",),
    rebuild: Rebuild = lambda trials: {},
) -> BaseStorage:
    """Open Optuna's storage: the given database, or a journal file in the study's folder.

    Only the study's driver, which holds its lock, opens it: nobody else writes to that file.

    Args:
        folder: Folder of the study.
        url: URL of the database; None is the journal file.
        directions: Directions of the study's objectives.
        rebuild: Returns what other files know of trials that a damaged journal lost.

    Raises:
        ConfigError: If the URL is invalid.
        EnvironmentProblem: If the database cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        # Of a driver that was killed as it wrote; Optuna would wait for it for half a minute.
        (folder / f"{JOURNAL_NAME}.lock").unlink(missing_ok=True)
        if (folder / JOURNAL_NAME).exists():
            study_id = read_record(folder).study_id if (folder / RECORD_FILE).exists() else ""
            repair_journal(folder / JOURNAL_NAME, study_id, directions, rebuild)
        return JournalStorage(WholeJournal(str(folder / JOURNAL_NAME)))
    with _as_refusal(url):
        # A connection that the server dropped while a trial trained is opened anew.
        return RDBStorage(with_secrets(url), engine_kwargs={"pool_pre_ping": True})


@contextmanager
def _as_refusal(url: str) -> Iterator[None]:
    """Turn errors about a database's URL into one message without its secrets."""
    try:
        with secrets_hidden(url):
            yield
    except DrtuneError:
        raise
    except (ArgumentError, ValueError) as error:  # the second: a port that is no number
        raise ConfigError(
            f"optuna_storage={url!r} is not valid: {first_line(error)}; write it like {EXAMPLE}"
        ) from None
    except ImportError as error:
        raise EnvironmentProblem(
            f"optuna_storage={url!r} needs a package that is not installed ({first_line(error)}): "
            "install drtune-ray[servers] for PostgreSQL"
        ) from None
    except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise EnvironmentProblem(
            f"optuna_storage={url!r} cannot be used: {first_line(error)}; check the address, the "
            f"database and the account in {EXAMPLE}"
        ) from None


def open_study(
    storage: BaseStorage, study_id: str, directions: Sequence[str] = ("maximize",)
) -> optuna.Study:
    """Load the Optuna study of an id, or create it."""
    return optuna.create_study(
        storage=storage,
        study_name=study_id,
        directions=[StudyDirection[direction.upper()] for direction in directions],
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


@contextmanager
def database_as_problem(url: str | None) -> Iterator[None]:
    """Turn errors of a database that answered before into one message.

    Raises:
        EnvironmentProblem: In place of the errors of Optuna and the database's driver.
    """
    try:
        with secrets_hidden(url):
            yield
    except Exception as error:
        if not (failures := [e for e in _chain(error) if isinstance(e, DATABASE_ERRORS)]):
            raise
        raise EnvironmentProblem(
            f"optuna_storage={url!r} did not do what it was asked ({first_line(failures[-1])}): "
            "repeat the command when it answers again"
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: Tune wraps the errors of a searcher."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def check_storage_of(
    former: Record, url: str | None, storage: BaseStorage, artifacts: StudyArtifacts
) -> None:
    """Refuse to resume a study in a storage that does not hold it.

    Args:
        former: Record of the study.
        url: URL of the storage; None is the journal file.
        storage: The open storage.
        artifacts: Files of the study, which show whether it has trials.

    Raises:
        ConfigError: Naming both addresses, or what is lost.
    """
    before = former.config.get("optuna_storage")
    if former.study_id in optuna.get_all_study_names(storage):
        return
    name = former.folder.name
    if before != url:
        raise ConfigError(
            f"study {name!r} keeps its trials in optuna_storage={place_text(before)}, and "
            f"{place_text(url)} does not hold them: give the former one, or copy the database "
            "there first"
        )
    if not artifacts.has_trials():  # its first run ended before there was one
        return
    lost = f"lost with the file {JOURNAL_NAME}" if url is None else "lost with the database"
    raise ConfigError(
        f"study {name!r} has run trials, and optuna_storage={place_text(url)} does not hold them: "
        f"their settings, values and ends are {lost}, and new trials would be mixed up with their "
        "checkpoints and MLflow runs. Bring it back from a backup, or give the study another --name"
    )
