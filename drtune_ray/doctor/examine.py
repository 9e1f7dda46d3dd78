"""Check everything that a study needs before it starts: the cluster, servers and files.

A failed check does not stop the others; a check that depends on it is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from drtune_ray.config.inputs import BackboneConfig
from drtune_ray.config.section import Section, validated
from drtune_ray.config.study import ResourcesConfig, StudyConfig
from drtune_ray.config.training import TrainingConfig
from drtune_ray.doctor.check_nodes import Nodes
from drtune_ray.doctor.check_ray import check_dashboard, check_reachable, check_token, described
from drtune_ray.doctor.check_storage import Places
from drtune_ray.doctor.clock_skew import FIX as CLOCK_FIX
from drtune_ray.doctor.clock_skew import Skew
from drtune_ray.doctor.findings import Examination, Finding
from drtune_ray.doctor.node_probe import reading_problem
from drtune_ray.errors import ConfigError, EnvironmentProblem
from drtune_ray.execution.capacity import Capacity, trial_demand, trials_that_fit
from drtune_ray.execution.environment import ADDRESS, environment, ray_address
from drtune_ray.execution.session import ray_session, set_environment
from drtune_ray.folders import is_object_uri
from drtune_ray.server_uri import ServerUri, with_secrets
from drtune_ray.study.checks import study_trainings
from drtune_ray.tracking.mlflow_client import default_tracking_uri
from drtune_ray.tracking.probe import Answer, ServerProbe
from drtune_ray.training.backbones import check_hub_weights, weights_file
from drtune_ray.values import full_path

STORAGE, SPACE, ARTIFACTS, DATABASE = "storage", "storage space", "artifacts", "optuna_storage"
REACHABLE, TOKEN, RAY, NODES = "ray address", "ray token", "ray", "nodes"
MLFLOW, ACCESS, RUNS = "mlflow", "mlflow access", "mlflow runs"


@dataclass(frozen=True)
class Setup:
    """What to check.

    Attributes:
        places: Places where studies are kept.
        address: Address of the Ray cluster; None starts one on this machine, as `tune` does.
        tracking_uri: URI of MLflow; None means SQLite under the storage.
        data: Folder of images; None skips the check.
        backbone: Backbone whose weights are checked; None skips the check.
        trainings: Trainings of a study, by the setting that sets their number of workers.
        resources: Resources of a worker.
    """

    places: Places
    address: str | None = None
    tracking_uri: str | None = None
    data: Path | None = None
    backbone: BackboneConfig | None = None
    trainings: Mapping[str, TrainingConfig] = field(default_factory=dict)
    resources: ResourcesConfig = ResourcesConfig()


def study_setup(config: StudyConfig, address: str | None) -> Setup:
    """Return the checks for a study."""
    images = config.trial.data.train
    return Setup(
        Places(full_path(config.storage), config.artifacts, config.optuna_storage),
        address,
        config.tracking.uri,
        None if is_object_uri(images) else full_path(images),
        config.trial.backbone,
        study_trainings(config),
        config.resources,
    )


class _Named(Section):
    """Places given by options, without a study."""

    storage: str
    artifacts: ServerUri | None = None
    optuna_storage: ServerUri | None = None
    tracking_uri: ServerUri | None = None
    backbone: str | None = None
    weights: str | None = None


def named_setup(values: Mapping[str, Any], address: str | None) -> Setup:
    """Return the checks for places given by options, without a study.

    Args:
        values: Values by option name.
        address: Address of the Ray cluster.

    Raises:
        ConfigError: If a value is not valid; every problem is named.
    """
    named = validated(_Named, values)
    given = {"name": named.backbone, "weights": named.weights}
    chosen = {key: value for key, value in given.items() if value is not None}
    return Setup(
        Places(full_path(named.storage), named.artifacts, named.optuna_storage),
        address,
        named.tracking_uri,
        backbone=validated(BackboneConfig, chosen) if chosen else None,
    )


def examine(setup: Setup, report: Callable[[Finding], None]) -> None:
    """Run all checks.

    Args:
        setup: What to check.
        report: Receives each finding at once.

    Raises:
        EnvironmentProblem: If a check failed, naming each that did.
    """
    set_environment()  # before anything imports Ray
    exam = Examination(report)
    with setup.places.left_as_they_were():
        _examine_places(exam, setup.places)
        _examine_files(exam, setup)
        _examine_tracking(exam, setup)
        _examine_cluster(exam, setup)
    exam.raise_if_failed()


def _examine_places(exam: Examination, places: Places) -> None:
    exam.check(STORAGE, places.check_storage)
    exam.check("storage owner", places.check_owner, [STORAGE])
    exam.check(SPACE, places.check_space)
    if places.artifacts:
        exam.check(ARTIFACTS, places.check_artifacts)
    if places.optuna_storage:
        exam.check(DATABASE, places.check_database)


def _examine_files(exam: Examination, setup: Setup) -> None:
    """Check the files that the command itself reads."""
    if setup.data is not None:
        exam.check("data", lambda: _readable(str(setup.data), "--data"))
    if setup.backbone is not None:
        exam.check("weights", lambda: _weights(setup.backbone or BackboneConfig()))


def _examine_tracking(exam: Examination, setup: Setup) -> None:
    if setup.tracking_uri is None:
        exam.check(MLFLOW, lambda: _own_store(setup.places.storage), [STORAGE])
        return
    probe = ServerProbe(setup.tracking_uri)
    if _is_server(setup.tracking_uri):
        answers: list[Answer] = []

        def check_health() -> str:
            answers.append(probe.check_health())
            return f"{setup.tracking_uri} answers"

        exam.check(MLFLOW, check_health)
        exam.check("mlflow clock", lambda: _server_clock(answers[0]), [MLFLOW])
        exam.check(ACCESS, lambda: _done(probe.check_access, "host name and login"), [MLFLOW])
    else:
        exam.check(ACCESS, lambda: _done(probe.check_access, "the store"))
    exam.check(RUNS, lambda: _done(probe.check_records, "a run with a metric"), [ACCESS])
    exam.check("mlflow artifacts", lambda: _done(probe.check_artifacts, "a file"), [RUNS])


def _examine_cluster(exam: Examination, setup: Setup) -> None:
    address = setup.address or ray_address()
    is_named = address not in ("local", "auto")
    if is_named:
        exam.check(REACHABLE, lambda: check_reachable(address))
        exam.check(TOKEN, lambda: check_token(address), [REACHABLE])
    with ExitStack() as stack:
        found: list[Capacity] = []

        def join() -> str:
            stack.enter_context(environment({ADDRESS: address}))
            # Trials of several workers, and `train`, need the State API.
            found.append(stack.enter_context(ray_session(with_dashboard=True)))
            return described(found[0])

        exam.check(RAY, join, [TOKEN] if is_named else [])
        if not is_named:
            exam.check(TOKEN, lambda: check_token(_joined_address()), [RAY])
        exam.check("ray state api", check_dashboard, [RAY])
        if setup.trainings:
            exam.check("trials", lambda: _fitting(setup, found[0]), [RAY])
        _examine_nodes(exam, setup)
        exam.check("shared files", setup.places.check_shared, _shared_needs(setup.places))


def _examine_nodes(exam: Examination, setup: Setup) -> None:
    nodes, paths = Nodes(), _paths(setup)
    exam.check(NODES, lambda: nodes.probe(list(paths.values())), [RAY])
    # Nodes that responded are checked even if others did not.
    needs = [] if nodes.reports else [NODES]
    exam.check("versions", nodes.check_versions, needs)
    exam.check("clocks", nodes.check_clocks, needs)
    exam.check("gpus", nodes.check_gpus, needs)
    exam.check("shared memory", nodes.check_shared_memory, needs)
    exam.check("ray disk", nodes.check_disks, needs)
    for what, path in paths.items():
        exam.check(f"{what} on nodes", partial(nodes.check_readable, path), needs)


def _paths(setup: Setup) -> dict[str, str]:
    """Return the paths that every node should be able to read, by their kind."""
    found = {}
    if setup.data is not None:
        found["data"] = str(setup.data)
    with suppress(ConfigError):  # already reported as a finding
        if setup.backbone is not None and (file := weights_file(setup.backbone)) is not None:
            found["weights"] = str(file)
    return found


def _shared_needs(places: Places) -> list[str]:
    return [RAY, ARTIFACTS if places.artifacts else STORAGE]


def _readable(path: str, option: str) -> str:
    if problem := reading_problem(path):
        raise EnvironmentProblem(f"{path} cannot be read ({problem}): give {option} another path")
    return f"{path} can be read"


def _weights(backbone: BackboneConfig) -> str:
    file = weights_file(backbone)
    if file is not None:
        return _readable(str(file), "--weights")
    check_hub_weights(backbone.name)
    return f"the weights of {backbone.name} are cached here, or their hub answers"


def _is_server(uri: str) -> bool:
    """Return whether a URI is an HTTP server; ``$NAME`` may hold the whole address."""
    with suppress(ConfigError):  # reported later as a finding
        uri = with_secrets(uri)
    return uri.startswith(("http://", "https://"))


def _own_store(storage: Path) -> str:
    uri = default_tracking_uri(storage)
    if not (storage / "mlflow.db").exists():  # opening it would create it
        return f"{uri}, which the first study creates"
    ServerProbe(uri).check_access()
    return f"{uri} can be read"


def _server_clock(answer: Answer) -> str:
    if answer.server_seconds is None:
        return "unknown: the server sends no Date header"
    # The header holds whole seconds, rounded down.
    middle = answer.server_seconds + 0.5 - (answer.sent_seconds + answer.received_seconds) / 2
    skew = Skew(middle, 0.5 + (answer.received_seconds - answer.sent_seconds) / 2)
    if skew.is_too_large:
        raise EnvironmentProblem(f"the server's clock is {skew}; {CLOCK_FIX}")
    return f"at most {abs(skew.seconds) + skew.uncertainty:.1f} s apart"


def _fitting(setup: Setup, capacity: Capacity) -> str:
    numbers = [
        trials_that_fit(trial_demand(training, setup.resources), setup.resources, capacity, setting)
        for setting, training in setup.trainings.items()
    ]
    return f"{numbers[0]} at a time"


def _joined_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _done(act: Callable[[], None], what: str) -> str:
    act()
    return f"{what}: accepted"
