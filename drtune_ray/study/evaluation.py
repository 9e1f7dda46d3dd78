"""The sealed test split of a study or training: opened for its winner, and what came of it."""

from __future__ import annotations

import logging

from drtune_ray.config.study import STUDY, StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.kinds.recognize import open_images
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.folders import files_as_problem, open_folder
from drtune_ray.results.evaluate import evaluate
from drtune_ray.results.evaluation_record import (
    WEIGHTS_NAME,
    Evaluation,
    read_result,
    write_result,
)
from drtune_ray.storage.record import (
    SPLITS_NAME,
    SPOOL_NAME,
    WINNER_NAME,
    Record,
    find_study,
    read_record,
)
from drtune_ray.study.sync import sync_study
from drtune_ray.tracking.events import MetricsRecorded
from drtune_ray.tracking.spool import Spool

logger = logging.getLogger(__name__)


@files_as_problem()
def evaluate_study(name_or_folder: str, storage: str, *, again: bool = False) -> Evaluation:
    """Open the sealed test split for a winner and record the result, or return the recorded one.

    Args:
        name_or_folder: Name of the study or training, or its folder.
        storage: Folder of the studies.
        again: Open the split although it was opened before, also for this winner.

    Raises:
        ConfigError: If there is no such study or winner, or the split was opened before for another
            model.
    """
    record = read_record(find_study(name_or_folder, storage))
    weights = record.folder / WINNER_NAME / WEIGHTS_NAME
    if not again and (known := read_result(record.folder, weights)) is not None:
        return known
    found = evaluate(
        record.folder / WINNER_NAME,
        record.folder / SPLITS_NAME,
        open_images(_trial(record).data),
        record.folder.parent,
        artifacts=open_folder(record.artifacts) if record.artifacts else None,
        again=again,
    )
    write_result(record.folder, weights, found)
    metrics = {"test_accuracy": found.test.share, "test_openings": float(found.num_openings)}
    Spool(record.folder / SPOOL_NAME).append(MetricsRecorded(None, 0, metrics))
    # A server that is away must not hide the answer: the event waits in the spool.
    try:
        sync_study(name_or_folder, storage)
    except EnvironmentProblem as error:
        logger.warning("%s; `drtune-ray sync` sends the result later", error)
    return found


def _trial(record: Record) -> TrialConfig:
    if record.kind == STUDY:
        return StudyConfig.from_mapping(record.config).trial
    return TrialConfig.from_mapping(record.config)
