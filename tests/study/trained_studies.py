"""Studies whose final runs are trained in this process, without a search and without Ray."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from drtune_ray.config.study import StudyConfig
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.pixels import DEFAULT_WHITES
from drtune_ray.data.splits import write_manifest
from drtune_ray.results.trials import TrialSummary
from drtune_ray.results.winner import write_winner
from drtune_ray.search.finalists import Finalist
from drtune_ray.storage.record import SPLITS_NAME, TRIALS_FOLDER, WINNER_NAME
from drtune_ray.study.checks import check_study
from drtune_ray.study.result import StudyResult
from drtune_ray.training.checkpoint import read_checkpoint, trial_folder
from drtune_ray.training.loop import train_epochs
from tests.small import prepared


class TrainedStudies:
    """Runs studies: one trial of the search, which is not trained, and its final runs."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, str]] = {}
        self.num_trained = 0
        self._known: dict[str, StudyResult] = {}

    def run(self, study: StudyConfig, tags: Mapping[str, str]) -> StudyResult:
        """Run a study; trainings that are there are not repeated."""
        self.tags[study.name] = dict(tags)
        write_manifest(check_study(study)[0].splits.manifest, study.folder / SPLITS_NAME)
        source = _summary(0, study.trial, 0.5, None)
        numbers = range(1, study.finalists.num_seeds + 1)
        runs = tuple(self._final(study, number) for number in numbers)
        finalist = Finalist(source, study.finalists.num_seeds, runs)
        former = self._known.get(study.name)
        study_id = former.study_id if former else f"{study.name}-{uuid.uuid4().hex}"
        self._known[study.name] = StudyResult(
            study.folder,
            study_id,
            (source, *runs),
            (finalist,),
            source,
            finalist.best_run,
            (),
            None,
            0,
            former is not None,
            ("optim.backbone_lr",),
            {"optim.backbone_lr": study.trial.optim.backbone_lr},
            1.0,
        )
        return self._known[study.name]

    def _final(self, study: StudyConfig, number: int) -> TrialSummary:
        config = study.trial.with_values({"seed": number, "data.view_seed": number})
        folder = trial_folder(study.folder / TRIALS_FOLDER, number)
        data, backbone, tables = prepared(config, study.folder.parent)
        if not folder.best.exists():
            self.num_trained += 1
            folder.begin("a trial")
            for report in train_epochs(config, data, backbone, num_threads=1):
                report.save(folder)
        value = read_checkpoint(folder.best)["record"]["metrics"]["best_val_accuracy"]
        about = {"study": study.name, "val_accuracy": value, "chosen": "one training"}
        known = (tables.backbone, data.classes, config, about, "a trial", DEFAULT_WHITES)
        write_winner(study.folder / WINNER_NAME, folder.best, *known)
        return _summary(number, config, value, f"trial 0, seed {number}")


def _summary(number: int, config: TrialConfig, value: float, finalist: str | None) -> TrialSummary:
    values, epochs = config.to_mapping(), config.training.epochs
    return TrialSummary(number, "COMPLETE", "completed", None, value, epochs, 1.0, values, finalist)


def best_weights(storage: Path, study: str, number: int) -> Path:
    """File with the weights of a final run."""
    return trial_folder(storage / study / TRIALS_FOLDER, number).best
