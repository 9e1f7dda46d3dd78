"""The capacity of a cluster: how many trials fit on its nodes, now and with an autoscaler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from drtune_ray.config.study import ResourcesConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem

# A cluster may declare this resource, to say on which nodes the process may live that waits for a
# trial's workers, and how many of them. Elsewhere it goes to the head node and takes no CPU.
TRIAL_DRIVER = "trial_driver"
HEAD_NODE = "node:__internal_head__"
HEAD_SHARE = 0.001
WORKERS = "training.workers"  # the setting that gives them
_UNITS = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one node."""

    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        return _bundle_text({"CPU": self.num_cpus, "GPU": self.num_gpus})


@dataclass(frozen=True)
class NodeGroup:
    """Nodes that an autoscaler may start; a `max_count` of None is any number."""

    name: str
    node: Node
    max_count: int | None

    def __str__(self) -> str:
        count = "any number of" if self.max_count is None else f"{self.max_count} x"
        return f"{count} {self.node}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class Demand:
    """Resources of a trial: one bundle a worker, each on one node."""

    num_workers: int
    num_cpus: float
    num_gpus: float

    def __str__(self) -> str:
        return f"{self.num_workers} x {_bundle_text(self.bundle())}"

    def bundle(self) -> dict[str, float]:
        """Return a worker's resources as Ray's mapping."""
        share = {"CPU": float(self.num_cpus), "GPU": float(self.num_gpus)}
        return {name: amount for name, amount in share.items() if amount}

    def bundles_on(self, node: Node) -> int:
        """Return how many workers a node holds."""
        by_cpus = _units(node.num_cpus) // _units(self.num_cpus)
        if not self.num_gpus:
            return by_cpus
        if self.num_gpus >= 1:
            return min(by_cpus, _units(node.num_gpus) // _units(self.num_gpus))
        # A share lies on one device: four devices hold 12 shares of 0.3, not 13.
        return min(by_cpus, int(node.num_gpus) * (_UNITS // _units(self.num_gpus)))


@dataclass(frozen=True)
class Capacity:
    """Total resources of the cluster, including those that others use now.

    Attributes:
        nodes: Nodes that are alive.
        groups: Groups of nodes that an autoscaler may start.
        limits: Totals that an autoscaler allows, by resource.
        has_autoscaler: Whether there is an autoscaler; it may not tell its maximum.
        num_trial_drivers: Declared amount of the resource `trial_driver`; None if undeclared.
        is_local: Whether Ray was started by this process, on this machine alone.
    """

    nodes: tuple[Node, ...]
    groups: tuple[NodeGroup, ...] = ()
    limits: tuple[tuple[str, float], ...] = ()
    has_autoscaler: bool = False
    num_trial_drivers: int | None = None
    is_local: bool = False

    def driver_resources(self) -> dict[str, float]:
        """Return the resources of a process that only waits for a trial's workers."""
        return {HEAD_NODE: HEAD_SHARE} if self.num_trial_drivers is None else {TRIAL_DRIVER: 1.0}

    def trials_now(self, demand: Demand) -> int:
        """Return how many trials the living nodes hold."""
        return self._at_most(sum(map(demand.bundles_on, self.nodes)), demand)

    def trials_ever(self, demand: Demand) -> int | None:
        """Return how many trials the cluster holds at its largest; None if no limit is known."""
        if not self.groups:
            return None if self.has_autoscaler else self.trials_now(demand)
        num_bundles: float = sum(map(demand.bundles_on, self._nodes_of_no_group()))
        for group in self.groups:
            count = math.inf if group.max_count is None else group.max_count
            if in_one := demand.bundles_on(group.node):
                num_bundles += in_one * count
        share = demand.bundle()
        for name, limit in self.limits:
            if name in share:
                num_bundles = min(num_bundles, _units(limit) // _units(share[name]))
        return None if math.isinf(num_bundles) else self._at_most(int(num_bundles), demand)

    def _at_most(self, num_bundles: int, demand: Demand) -> int:
        fitting = num_bundles // demand.num_workers
        if demand.num_workers == 1 or self.num_trial_drivers is None:
            return fitting
        return min(fitting, self.num_trial_drivers)

    def _nodes_of_no_group(self) -> list[Node]:
        """Return the living nodes of no group, mostly the head; groups count by their maximum."""
        shapes = {group.node for group in self.groups if group.max_count != 0}
        return [node for node in self.nodes if node not in shapes]

    def __str__(self) -> str:
        cpus, gpus = (sum(n.num_cpus for n in self.nodes), sum(n.num_gpus for n in self.nodes))
        largest = max(self.nodes, key=lambda n: (n.num_gpus, n.num_cpus), default=Node(0, 0))
        text = (
            f"{cpus:g} CPUs and {gpus:g} GPUs on {nodes_text(self.nodes)} (the largest: {largest})"
        )
        if self.groups:
            text += f"; the autoscaler starts at most {', '.join(map(str, self.groups))}"
        if self.limits:
            text += f", in all {_bundle_text(dict(self.limits))}"
        return text


def trial_demand(training: TrainingConfig, resources: ResourcesConfig) -> Demand:
    """Return the minimum resources of a trial.

    Raises:
        ConfigError: If workers would share a GPU, or have one and a half.
    """
    workers = training.min_workers
    share = resources.worker_gpus(workers)
    setting = "resources.gpus_per_worker"
    if resources.gpus_per_trial is not None:
        setting = "resources.gpus_per_trial"
        if training.min_workers != training.max_workers:
            raise ConfigError(
                f"{setting}={resources.gpus_per_trial:g} has no meaning with "
                f"training.workers=[{training.min_workers}, {training.max_workers}]: give "
                "resources.gpus_per_worker"
            )
    if 0 < share < 1 and training.max_workers > 1:
        raise ConfigError(
            f"{setting} gives each of {training.max_workers} workers {share:g} of a GPU, but the "
            "workers of one trial cannot share a GPU: give each a whole one or set "
            "training.workers=1"
        )
    if share > 1 and share != int(share):
        raise ConfigError(
            f"{setting} gives a worker {share:g} GPUs: above 1 it must be a whole number"
        )
    return Demand(workers, resources.cpus_per_worker, share)


def trials_that_fit(
    demand: Demand, resources: ResourcesConfig, capacity: Capacity, setting: str = WORKERS
) -> int:
    """Return how many trials run at a time, at most `resources.trials_at_a_time`.

    Args:
        demand: Resources of a trial.
        resources: Settings of the study.
        capacity: Capacity of the cluster.
        setting: Name of the setting that gives the number of workers.

    Raises:
        EnvironmentProblem: If not even one trial ever fits; gives the numbers.
    """
    ever = capacity.trials_ever(demand)
    if ever == 0:
        settings = ["resources.cpus_per_worker"]
        if demand.num_gpus:
            settings.append(
                "resources.gpus_per_worker"
                if resources.gpus_per_trial is None
                else "resources.gpus_per_trial"
            )
        if demand.num_workers > 1:
            settings.append(setting)
        raise EnvironmentProblem(
            f"a trial takes {demand}, each part on one node, but there are {capacity}: lower "
            f"{' or '.join(settings)}"
        )
    fitting = max(1, capacity.trials_now(demand)) if ever is None else ever
    asked = resources.trials_at_a_time
    if asked is None:
        return fitting
    return asked if ever is None else min(asked, fitting)


def _units(amount: float) -> int:
    return round(amount * _UNITS)


def nodes_text(nodes: Iterable[Any]) -> str:
    """Return "1 node" or "3 nodes"."""
    number = len(list(nodes))
    return f"{number} node" if number == 1 else f"{number} nodes"


def _bundle_text(bundle: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items()) + "}"


@dataclass(frozen=True)
class Cluster:
    """The cluster on which trials run.

    Attributes:
        capacity: Its capacity.
        token: Token that its nodes must find in the shared storage; None if they share nothing.
        on_notice: Takes a line for the user.
    """

    capacity: Capacity
    token: str | None
    on_notice: Callable[[str], None]
