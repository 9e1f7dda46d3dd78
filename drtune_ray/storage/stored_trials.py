"""Read the trials of a study from its storage, which may be in use; nothing is changed.

Optuna's storages are imported late: a command that only shows a study must not wait for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drtune_ray.errors import EnvironmentProblem, first_line
from drtune_ray.server_uri import secrets_hidden, with_secrets
from drtune_ray.storage.record import JOURNAL_NAME, Record


def stored_trials(record: Record, notes: list[str] | None = None) -> list[Any]:
    """Return Optuna's frozen trials of a study, empty where it has not started one.

    Args:
        record: The study.
        notes: List that receives a sentence for each part of its journal that cannot be read.

    Raises:
        ConfigError: If an environment variable that its database's address names is not set.
        EnvironmentProblem: If its database does not answer.
    """
    url = record.config.get("optuna_storage")
    if url is not None:
        return _of_database(url, record)
    if not (record.folder / JOURNAL_NAME).exists():  # Optuna would make it
        return []
    return _of_journal(record, [] if notes is None else notes)


def _of_journal(record: Record, notes: list[str]) -> list[Any]:
    from drtune_ray.storage.journal import read_journal

    storage, damaged = read_journal(record.folder / JOURNAL_NAME, record.study_id)
    notes += damaged
    return _all_trials(storage, record.study_id)


def _of_database(url: str, record: Record) -> list[Any]:
    from optuna.exceptions import OptunaError
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    address = with_secrets(url)
    try:
        parts = make_url(address)
        if parts.get_backend_name() == "sqlite" and not Path(parts.database or "").is_file():
            raise FileNotFoundError(f"there is no file {parts.database}")  # SQLite would make it
        with secrets_hidden(url):
            storage = RDBStorage(
                address, engine_kwargs={"pool_pre_ping": True}, skip_table_creation=True
            )
            return _all_trials(storage, record.study_id)
    except (OptunaError, SQLAlchemyError, ImportError, RuntimeError, OSError) as error:
        cause = error.__cause__ if isinstance(error, OptunaError) else error
        raise EnvironmentProblem(
            f"optuna_storage={url!r}, which holds the trials, cannot be read: "
            f"{first_line(cause or error)}"
        ) from None


def _all_trials(storage: Any, study_id: str) -> list[Any]:
    try:
        number = storage.get_study_id_from_name(study_id)
    except KeyError:  # it was begun and has no trial yet
        return []
    found: list[Any] = storage.get_all_trials(number, deepcopy=False)
    return found
