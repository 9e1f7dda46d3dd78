"""A search without Ray: a `StudySearch` over a real Optuna study, and results to tell it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from drtune_ray.config.metric import METRICS
from drtune_ray.config.study import BudgetConfig, ResourcesConfig, SamplerConfig, reference_config
from drtune_ray.config.trial import TrialConfig
from drtune_ray.execution.capacity import Capacity, Cluster
from drtune_ray.execution.ray_tune.searcher import StudySearch
from drtune_ray.execution.run_context import RunContext
from drtune_ray.search.budget import Budget
from drtune_ray.search.outcomes import Outcomes
from drtune_ray.search.proposals import FixedTrial, SearchProposals
from drtune_ray.search.samplers import build_sampler
from drtune_ray.space.search_space import SearchSpace
from drtune_ray.storage.artifacts import StudyArtifacts
from drtune_ray.storage.optuna_storage import open_storage, open_study
from drtune_ray.training.reports import HISTORY, OBJECTIVE

SPACE = {
    "parameters": {
        "optim.backbone_lr": {"float": [1e-4, 1.0], "log": True},
        "method.bank_size": {"int": [8, 64], "log": True},
    }
}


def searching(
    study: optuna.Study,
    base: TrialConfig,
    num_trials: int,
    references: tuple[str, ...] = (),
    seed: int = 0,
    space: dict[str, Any] = SPACE,
    budget: dict[str, Any] | None = None,
    **more: Any,
) -> StudySearch:
    ends = Budget(num_trials, BudgetConfig(**(budget or {})), study)
    proposals = SearchProposals(
        study,
        SearchSpace.from_mapping(space, base),
        base,
        tuple(FixedTrial(name, reference_config(base, name)) for name in references),
        ends,
        partial(build_sampler, SamplerConfig(), seed),
        **more,
    )
    return StudySearch(proposals, Outcomes(study, ends))


def opened(folder: Path) -> optuna.Study:
    return open_study(open_storage(folder, None), "a-study")


def run_context(folder: Path) -> RunContext:
    """A run whose events nobody takes, on no cluster."""
    return RunContext(
        folder,
        "a-study",
        ResourcesConfig(),
        StudyArtifacts(None, folder),
        Cluster(Capacity((), (), (), False, None, True), None, print),
        [].append,
        disk_error=lambda: None,
        on_interrupt=lambda: None,
    )


def result(values: list[float], outcome: str = "", name: str = "val_accuracy") -> dict[str, Any]:
    metric = METRICS[name]
    best = [max(values[: i + 1], key=metric.score) for i in range(len(values))]
    history = [
        {
            "epoch": i + 1,
            "time_ms": i,
            "metrics": {metric.best: value, "best_epoch": float(values.index(value) + 1)},
            "steps": [],
        }
        for i, value in enumerate(best)
    ]
    return {
        OBJECTIVE: best[-1] if best else float("nan"),
        "epoch": len(values),
        "outcome": outcome,
        HISTORY: json.dumps(history),
        "num_threads": 1,
        "done": bool(outcome),
    }
