"""Studies of any size, written through the project's own storage code without training anything."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
from optuna.trial import FrozenTrial, TrialState, create_trial

from drtune_ray.config.metric import METRICS
from drtune_ray.config.study import STUDY, StudyConfig, reference_config
from drtune_ray.config.trial import TrialConfig
from drtune_ray.data.sources import FILE_SCHEMA
from drtune_ray.data.splits import write_manifest
from drtune_ray.results import trials
from drtune_ray.search.objectives import direction
from drtune_ray.space.search_space import SearchSpace, read_space
from drtune_ray.storage.fingerprint import open_record
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.storage.record import SPLITS_NAME, SPOOL_NAME, Record
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted
from drtune_ray.tracking.spool import Spool
from drtune_ray.values import flattened, nested

EPOCHS = 12
START_MS = 1_790_000_000_000
HOSTS = ("node-a", "node-b")
DIVERGED, STOPPED, LOST = "diverged", "stopped by the scheduler", "node lost"
SPLITS = {"train": 6, "validation": 4, "test": 4}  # images of each class


class MadeStudy:
    """A study that looks as if it had been run.

    Args:
        folder: Its folder.
        space: Name of its search space.
        changes: Settings of the study by dotted path.
    """

    def __init__(self, folder: Path, space: str = "quick", **changes: Any) -> None:
        folder.mkdir(parents=True)
        values = {"name": folder.name, "storage": str(folder.parent), "trials": 10}
        values |= {"trial.data.train": "images", "trial.training.epochs": EPOCHS}
        content = read_space(space)
        self.config = StudyConfig.from_mapping(nested(values | {"space": content} | changes))
        self.metric = METRICS[self.config.trial.training.metric]
        self.space = SearchSpace.from_mapping(content, self.config.trial)
        plain = self.config.to_mapping()
        self.record: Record = open_record(folder, STUDY, plain, {}, self.config.tracking, None)
        self.folder, self.spool = folder, Spool(folder / SPOOL_NAME)
        directions = [direction(name) for name in self.config.objectives]
        self.study = open_study(
            open_storage(folder, None, directions), self.record.study_id, directions
        )
        sampler = optuna.samplers.RandomSampler(seed=1)
        self._asked = optuna.create_study(sampler=sampler)
        self.random = np.random.default_rng(0)
        self._free = [START_MS] * 4  # when each of two places on two hosts is free

    def splits(self, images: int = 100) -> None:
        """Write a table of splits with this many validation images of two classes."""
        rows = [
            {
                "path": f"{split}/{i}.png",
                "label": i % 2,
                "content_hash": f"{split}{i}",
                "split": split,
            }
            for split, number in {"train": 8, "validation": images, "test": 8}.items()
            for i in range(number)
        ]
        schema = FILE_SCHEMA.append(pa.field("split", pa.string()))
        write_manifest(pa.Table.from_pylist(rows, schema), self.folder / SPLITS_NAME)

    def references(self) -> None:
        """Add the reference trials, all completed."""
        for name in self.config.reference_trials:
            config = reference_config(self.config.trial, name)
            self.trial(config, {}, {}, reference=name)

    def sampled(self, number: int = 1) -> None:
        """Add trials of the search: every ninth diverges, the worse half is stopped early."""
        for _ in range(number):
            asked = self._asked.ask()
            config = self.space.suggest(asked, self.config.trial)
            self.trial(config, asked.params, asked.distributions)

    def trial(
        self,
        config: TrialConfig,
        params: dict[str, Any],
        distributions: dict[str, Any],
        *,
        end: tuple[str, str] | None = None,
        curve: list[float] | None = None,
        **marks: Any,
    ) -> None:
        """Add a trial.

        Args:
            config: Its configuration.
            params: Its sampled parameters.
            distributions: Their distributions.
            end: State and outcome; chosen if it is None.
            curve: Accuracies by epoch; drawn if it is None. A minimised metric is their negative
                logarithm.
            marks: User attributes such as the reference's name.
        """
        number = len(self.study.get_trials(deepcopy=False))
        drawn = self._curve(config)
        state, outcome = end or self._end(number, drawn, is_fixed=bool(marks))
        accuracies = curve or {DIVERGED: drawn[:2], STOPPED: drawn[:4]}.get(outcome, drawn)
        is_loss = self.metric.direction == "minimize"
        measured = [-math.log(value) if is_loss else value for value in accuracies]
        extreme = np.minimum if is_loss else np.maximum
        best = [float(value) for value in extreme.accumulate(measured)]
        place = int(np.argmin(self._free))
        attributes = {
            trials.CONFIG: json.dumps(config.to_mapping()),
            trials.HOST: HOSTS[place // 2],
            **marks,
        }
        if state != "RUNNING":
            attributes[trials.OUTCOME] = outcome
        objectives = self._objectives(best[-1], max(accuracies))
        if len(objectives) > 1:
            attributes |= {f"{trials.EPOCH_PREFIX}{i}": v for i, v in enumerate(best, 1)}
            attributes[trials.OBJECTIVES] = objectives
        self._tell(number, state, params, distributions, attributes, best, objectives)
        values = [
            {"val_accuracy": accuracy, self.metric.measure: value, self.metric.best: top}
            for accuracy, value, top in zip(accuracies, measured, best, strict=True)
        ]
        self._spool_events(number, config, values, state, outcome, place)

    def _tell(
        self,
        number: int,
        state: str,
        params: dict[str, Any],
        distributions: dict[str, Any],
        attributes: dict[str, Any],
        best: list[float],
        objectives: dict[str, float],
    ) -> None:
        is_complete = state == "COMPLETE"
        found: FrozenTrial = create_trial(
            state=TrialState[state],
            values=list(objectives.values()) if is_complete else None,
            params=params,
            distributions=distributions,
            user_attrs=attributes,
            intermediate_values=dict(enumerate(best, 1)) if len(objectives) == 1 else {},
        )
        self.study.add_trial(found)

    def _objectives(self, best: float, accuracy: float) -> dict[str, float]:
        known = {"latency_ms": 2.0 + 20 * (1 - accuracy) + self.random.uniform(0, 3)}
        known |= {"calibration_error": self.random.uniform(0.02, 0.2)}
        known |= {self.config.objectives[0]: best}
        return {name: float(known[name]) for name in self.config.objectives}

    def _curve(self, config: TrialConfig) -> list[float]:
        """Accuracies that rise to a peak which depends on lambda, K and the learning rate."""
        values = flattened(config.to_mapping())
        weight, rate = values["method.regularization_weight"], values["optim.backbone_lr"]
        weight = 1.0 if isinstance(weight, str) else max(float(weight), 1e-6)
        away = 0.05 * math.log10(weight) ** 2 + 0.04 * (math.log10(rate) + 2.5) ** 2
        peak = 0.9 - away + 0.01 * math.log10(values["method.bank_size"])
        peak -= 0.06 if values["method.name"] == "ce_tuning" else 0.0
        noise = self.random.normal(0, 0.008, EPOCHS)
        rises = (peak * (1 - math.exp(-epoch / 2.5)) for epoch in range(1, EPOCHS + 1))
        return [float(np.clip(v + e, 0.01, 0.99)) for v, e in zip(rises, noise, strict=True)]

    def _end(self, number: int, curve: list[float], is_fixed: bool) -> tuple[str, str]:
        if is_fixed:
            return "COMPLETE", "completed"
        if number % 9 == 5:
            return "PRUNED", DIVERGED
        if number % 31 == 30:
            return "FAIL", LOST
        return ("PRUNED", STOPPED) if curve[3] < 0.66 else ("COMPLETE", "completed")

    def _spool_events(
        self,
        number: int,
        config: TrialConfig,
        values: list[dict[str, float]],
        state: str,
        outcome: str,
        place: int,
    ) -> None:
        now = self._free[place]
        params = flattened(config.to_mapping())
        self.spool.append(RunStarted(number, f"t{number:03d}", params, {}, now))
        for epoch, measured in enumerate(values, 1):
            now += int(20_000 + 2_000 * self.random.random())
            metrics = {"seconds": 20.5, "val_calibration_error": 0.2 / epoch} | measured
            if config.method.name == "dr_tune":
                drift = 0.4 * (1 - math.exp(-epoch / 3)) + 0.02 * float(self.random.random())
                metrics |= {
                    "semantic_drift": drift,
                    "semantic_drift_remaining": drift * 0.4,
                    "rotation_angle": 20.0 * drift,
                    "head_agreement": 0.8 + 0.01 * epoch,
                    "dr_gradient_share": 0.5 + 0.01 * epoch,
                    "sparse_class_share": 0.1,
                }
            self.spool.append(MetricsRecorded(number, epoch, metrics, now))
        if state != "RUNNING":
            self.spool.append(RunFinished(number, state, outcome, {}, {}, now + 500))
        self._free[place] = now + 2_000


def made_study(folder: Path, num_trials: int, **changes: Any) -> MadeStudy:
    """A study of reference trials and sampled ones, with a table of splits."""
    made = MadeStudy(folder, **({"trials": num_trials} | changes))
    made.splits()
    made.references()
    made.sampled(num_trials - len(made.config.reference_trials))
    return made
