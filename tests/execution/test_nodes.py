"""What fits on which nodes, and what is refused before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from drtune_ray.config.study import ResourcesConfig, StudyConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.execution.capacity import (
    Capacity,
    Demand,
    Node,
    NodeGroup,
    trial_demand,
    trials_that_fit,
)
from drtune_ray.execution.ray_state import read_capacity
from drtune_ray.study.run import run_study
from tests.clusters import joined
from tests.study.test_study import study_values

ONE_CPU, TWO_CPUS, FOUR_CPUS = Node(1, 0), Node(2, 0), Node(4, 0)
ANY = ResourcesConfig()


@pytest.mark.parametrize(
    ("nodes", "demand", "fitting"),
    [
        ([ONE_CPU, ONE_CPU], Demand(1, 2, 0), 0),  # two CPUs in all, on no node together
        ([ONE_CPU, ONE_CPU], Demand(2, 1, 0), 1),
        ([Node(3, 0), Node(3, 0)], Demand(1, 2, 0), 2),  # not 6 // 2
        ([Node(3, 0), Node(3, 0)], Demand(2, 2, 0), 1),
        ([Node(0, 0), Node(8, 1)], Demand(1, 2, 1), 1),
        ([Node(8, 4)], Demand(1, 1, 2), 2),
        ([Node(16, 1)], Demand(1, 1, 0.25), 4),
        ([Node(2, 1)], Demand(1, 1, 0.25), 2),
        ([Node(16, 4)], Demand(1, 1, 0.3), 12),  # three a device; 13 times 0.3 is below 4 too
        ([Node(16, 0), Node(1, 4)], Demand(1, 2, 1), 0),  # CPUs here, GPUs there
        ([], Demand(1, 1, 0), 0),
    ],
)
def test_trials_now__packs_bundles_on_nodes(nodes, demand, fitting):
    assert Capacity(tuple(nodes)).trials_now(demand) == fitting


def test_trials_now__trial_drivers_are_limited_where_they_are_declared():
    capacity = Capacity((Node(16, 0),), num_trial_drivers=3)
    assert capacity.trials_now(Demand(2, 1, 0)) == 3
    assert capacity.trials_now(Demand(1, 1, 0)) == 16  # they have no driver of their own
    assert capacity.driver_resources() == {"trial_driver": 1.0}
    assert "CPU" not in Capacity((Node(16, 0),)).driver_resources()


@pytest.mark.parametrize(
    ("groups", "limits", "demand", "fitting"),
    [
        ([NodeGroup("small", TWO_CPUS, 3)], {}, Demand(1, 2, 0), 3),
        ([NodeGroup("small", TWO_CPUS, 3)], {}, Demand(1, 1, 0), 7),  # and the head's
        ([NodeGroup("small", TWO_CPUS, 3)], {}, Demand(1, 4, 0), 0),
        ([NodeGroup("gone", FOUR_CPUS, 0)], {}, Demand(1, 4, 0), 0),
        ([NodeGroup("any", FOUR_CPUS, None)], {}, Demand(1, 4, 0), None),
        ([NodeGroup("any", FOUR_CPUS, None)], {"CPU": 10.0}, Demand(1, 4, 0), 2),
        ([NodeGroup("any", FOUR_CPUS, None)], {"GPU": 1.0}, Demand(1, 4, 0), None),
        (
            [NodeGroup("small", TWO_CPUS, 3), NodeGroup("gpu", Node(4, 1), 2)],
            {},
            Demand(1, 1, 1),
            2,
        ),
    ],
)
def test_trials_ever__counts_what_the_autoscaler_may_start(groups, limits, demand, fitting):
    capacity = Capacity((ONE_CPU,), tuple(groups), tuple(limits.items()), has_autoscaler=True)
    assert capacity.trials_ever(demand) == fitting


def test_trials_ever__living_nodes_of_a_group_count_once():
    capacity = Capacity((ONE_CPU, TWO_CPUS, TWO_CPUS), (NodeGroup("small", TWO_CPUS, 3),))
    assert capacity.trials_ever(Demand(1, 2, 0)) == 3


def test_trials_ever__an_autoscaler_that_does_not_say_its_maximum_is_given_the_chance():
    silent = Capacity((Node(0, 0),), has_autoscaler=True)
    assert trials_that_fit(Demand(1, 8, 1), ANY, silent) == 1
    assert trials_that_fit(Demand(1, 8, 1), ResourcesConfig(trials_at_a_time=5), silent) == 5


def test_trials_that_fit__no_more_than_asked_for():
    capacity = Capacity((FOUR_CPUS,))
    assert trials_that_fit(Demand(1, 1, 0), ANY, capacity) == 4
    assert trials_that_fit(Demand(1, 1, 0), ResourcesConfig(trials_at_a_time=3), capacity) == 3
    assert trials_that_fit(Demand(1, 1, 0), ResourcesConfig(trials_at_a_time=9), capacity) == 4


def test_trials_that_fit__the_refusal_gives_the_numbers_and_the_settings():
    capacity = Capacity((ONE_CPU, Node(2, 1)), (NodeGroup("small", TWO_CPUS, 3),))
    message = (
        "a trial takes 2 x {CPU: 4, GPU: 1}, each part on one node, but there are 3 CPUs and 1 "
        "GPUs on 2 nodes (the largest: {CPU: 2, GPU: 1}); the autoscaler starts at most 3 x "
        "{CPU: 2, GPU: 0} (small): lower resources.cpus_per_worker or resources.gpus_per_worker "
        "or training.workers"
    )
    with pytest.raises(EnvironmentProblem, match=f"^{re.escape(message)}$"):
        trials_that_fit(Demand(2, 4, 1), ANY, capacity)


def test_trials_that_fit__the_refusal_names_what_was_set():
    with pytest.raises(EnvironmentProblem, match=r"lower resources\.cpus_per_worker$"):
        trials_that_fit(Demand(1, 4, 0), ANY, Capacity((ONE_CPU,)))
    share = ResourcesConfig(gpus_per_trial=0.5)
    with pytest.raises(EnvironmentProblem, match=r"or resources\.gpus_per_trial$"):
        trials_that_fit(Demand(1, 1, 0.5), share, Capacity((ONE_CPU,)))


def test_trial_demand__the_least_of_an_elastic_training():
    assert trial_demand(TrainingConfig(workers=(2, 8)), ANY) == Demand(2, 1, 0)


@pytest.mark.parametrize(
    ("workers", "resources", "share"),
    [
        (1, {"gpus_per_trial": 0.25}, 0.25),
        (1, {"gpus_per_worker": 2}, 2),
        (2, {"gpus_per_trial": 2}, 1),
        (4, {"gpus_per_worker": 1}, 1),
    ],
)
def test_trial_demand__shares_of_gpus(workers, resources, share):
    demand = trial_demand(TrainingConfig(workers=workers), ResourcesConfig(**resources))
    assert demand.num_gpus == share


@pytest.mark.parametrize(
    ("workers", "resources", "message"),
    [
        (2, {"gpus_per_trial": 1}, r"gives each of 2 workers 0\.5 of a GPU, but .* cannot share"),
        (2, {"gpus_per_worker": 0.5}, r"gpus_per_worker gives each of 2 workers 0\.5 of a GPU"),
        ((1, 4), {"gpus_per_worker": 0.5}, r"gives each of 4 workers 0\.5 of a GPU"),
        (1, {"gpus_per_worker": 1.5}, r"gives a worker 1\.5 GPUs: above 1 it must be a whole"),
        (2, {"gpus_per_trial": 3}, r"gpus_per_trial gives a worker 1\.5 GPUs"),
        ((1, 2), {"gpus_per_trial": 2}, r"has no meaning with training\.workers=\[1, 2\]"),
    ],
)
def test_trial_demand__shares_that_no_trial_can_use(workers, resources, message):
    with pytest.raises(ConfigError, match=message):
        trial_demand(TrainingConfig(workers=workers), ResourcesConfig(**resources))


# ---- a real cluster: a node with two CPUs, and one with one


@pytest.fixture
def two_nodes(shared_ray) -> Iterator[Any]:
    node = shared_ray.add_node(num_cpus=1)
    try:
        yield shared_ray
    finally:
        forget_groups(shared_ray.address)
        shared_ray.remove_node(node)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("clusters")
def test_refused_on_a_cluster__three_cpus_on_two_nodes_are_not_three_on_one(
    two_nodes, tmp_path, weights_file
):
    values = study_values(tmp_path, weights_file, resources={"cpus_per_worker": 3})
    refused = (
        r"a trial takes 1 x \{CPU: 3\}, .* there are 3 CPUs .* on 2 nodes .*\{CPU: 2, GPU: 0\}"
    )
    with pytest.raises(EnvironmentProblem, match=refused):
        run_study(StudyConfig.from_mapping(values))
    assert not (tmp_path / "studies" / "small").exists()  # nothing was written

    # An autoscaler that says its maximum: still too small, then large enough.
    report_groups(two_nodes.address, {"CPU": 1}, 5)
    with pytest.raises(EnvironmentProblem, match=r"at most 5 x \{CPU: 1, GPU: 0\} \(workers\)"):
        run_study(StudyConfig.from_mapping(values))
    report_groups(two_nodes.address, {"CPU": 3}, 3)
    with joined(two_nodes.address):
        capacity = read_capacity(is_local=False)
    assert set(capacity.nodes) == {TWO_CPUS, ONE_CPU}
    assert capacity.trials_now(Demand(1, 3, 0)) == 0
    assert trials_that_fit(Demand(1, 3, 0), ANY, capacity) == 3
    assert not capacity.has_autoscaler  # seen apart from what it says: by the names of the nodes
    assert not (tmp_path / "studies" / "small").exists()


def report_groups(address: str, resources: dict[str, int], max_count: int) -> None:
    """What an autoscaler tells Ray."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    group = NodeGroupConfig(resources=resources, min_count=0, max_count=max_count, name="workers")
    config = ClusterConfig(node_group_configs=[group])
    GcsClient(address=address).report_cluster_config(config.SerializeToString())


def forget_groups(address: str) -> None:
    """The autoscaler may start nothing."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    GcsClient(address=address).report_cluster_config(ClusterConfig().SerializeToString())


def test_run_study__shares_are_checked_first(tmp_path, weights_file):
    values = study_values(tmp_path, weights_file, resources={"gpus_per_worker": 0.5})
    values["trial"]["training"] |= {"workers": 2, "batch_norm": "frozen"}
    with pytest.raises(ConfigError, match="cannot share a GPU"):
        run_study(StudyConfig.from_mapping(values))
