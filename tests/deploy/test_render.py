"""`drtune-ray deploy render`: what it makes of a study, and what it refuses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from drtune_ray.cli.deploy import deploy
from drtune_ray.errors import ConfigError
from drtune_ray.manifests.overlays import deploy_folder, overlaid_rayjob, overlay_names
from drtune_ray.manifests.render import (
    MAX_NAME,
    RenderOptions,
    object_name,
    render_study,
)
from drtune_ray.values import deep_merge
from tests.deploy.manifests import OVERLAYS, RENDERS, ROOT, STUDIES, Object, Render, key, rendered

IMAGE = f"example.org:5000/drtune-ray@sha256:{'0' * 64}"
SERVERS: dict[str, Any] = {
    "optuna_storage": "postgresql+psycopg://drtune:$PG@postgres/drtune",
    "artifacts": "s3://bucket/drtune",
    "tracking": {"uri": "http://mlflow:5000"},
}


def study(tmp_path: Path, **changes: Any) -> Path:
    content = {
        "name": "flowers",
        "trials": 12,
        "resources": {"trials_at_a_time": 2, "cpus_per_worker": 3},
        "trial": {
            "data": {"train": "/storage/flowers"},
            "backbone": {"name": "resnet18.a1_in1k", "weights": "/storage/w.safetensors"},
        },
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(deep_merge(content, changes)))
    return file


def job(file: Path, overlay: str = "kind-cpu", **options: Any) -> Object:
    options = {"claim": "storage"} | options
    objects = render_study(file, RenderOptions(overlay=overlay, **options)).objects
    return {one["kind"]: one for one in objects}["RayJob"]


def workers(rayjob: Object) -> Object:
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def limits(group: Object) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        render_study(file, RenderOptions(**({"overlay": "kind-cpu", "claim": "s"} | options)))
    return str(caught.value)


def test_overlays__are_the_folders() -> None:
    assert tuple(overlay_names()) == OVERLAYS


def test_overlaid_rayjob__unknown() -> None:
    with pytest.raises(ConfigError, match="^unknown overlay 'gpus'; did you mean 'gpu'\\?$"):
        overlaid_rayjob("gpus")


# ---- workers


@pytest.mark.parametrize(
    ("changes", "overlay", "count", "cpus", "gpus"),
    [
        ({}, "kind-cpu", 2, "3", None),
        ({"trials": 3, "resources": {"trials_at_a_time": 9}}, "kind-cpu", 3, "3", None),
        ({"trial": {"training": {"workers": 3}}}, "kind-cpu", 6, "3", None),
        ({"resources": {"gpus_per_worker": 1}}, "kueue", 2, "3", "1"),
        ({"resources": {"gpus_per_worker": 2}}, "kueue", 2, "3", "2"),
        (
            {"resources": {"gpus_per_worker": 0.3, "trials_at_a_time": 7}},
            "kueue",
            3,  # three trials on a GPU
            "9",
            "1",
        ),
        ({"resources": {"gpus_per_trial": 0.25}}, "kueue", 1, "6", "1"),
        (
            {"resources": {"gpus_per_trial": 4}, "trial": {"training": {"workers": 2}}},
            "kueue",
            4,
            "3",
            "2",
        ),
    ],
)
def test_workers__from_the_resources(
    tmp_path: Path, changes: dict[str, Any], overlay: str, count: int, cpus: str, gpus: str | None
) -> None:
    group = workers(job(study(tmp_path, **changes), overlay))
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [count] * 3
    assert (limits(group)["cpu"], limits(group).get("nvidia.com/gpu")) == (cpus, gpus)


def test_workers__an_autoscaler_starts_with_none(tmp_path: Path) -> None:
    group = workers(job(study(tmp_path, resources={"gpus_per_worker": 1}), "gpu"))
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [0, 0, 2]


def test_memory__of_those_who_share_a_gpu(tmp_path: Path) -> None:
    changes = {"resources": {"gpus_per_worker": 0.5, "trials_at_a_time": 4}}
    group = workers(job(study(tmp_path, **changes), "kueue", worker_memory_gib=6))
    assert limits(group)["memory"] == f"{2 * 6 * 1024}Mi"


def test_head__drives_the_trials(tmp_path: Path) -> None:
    changes = {"resources": {"trials_at_a_time": 4}, "trial": {"training": {"workers": 2}}}
    head = job(study(tmp_path, **changes))["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["resources"] == {"CPU": "0", "trial_driver": "4"}
    assert limits(head)["memory"] == f"{(4 + 6) * 1024}Mi"
    head = job(study(tmp_path), head_memory_gib=5)["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert limits(head)["memory"] == f"{5 * 1024}Mi"


# ---- names, deadlines, files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flowers", "flowers"),
        ("a" * MAX_NAME, "a" * MAX_NAME),
        ("Flowers", "flowers-a3b6cb52"),
        ("7.days", "study-7-days-117ea0fe"),
        ("a" * 60, "a" * 38 + "-11ee3912"),
    ],
)
def test_object_name(name: str, expected: str) -> None:
    assert object_name(name) == expected
    assert len(object_name(name)) <= MAX_NAME


def test_job__deadline_and_image(tmp_path: Path) -> None:
    made = job(study(tmp_path), deadline_hours=2, image=IMAGE)
    assert made["spec"]["activeDeadlineSeconds"] == 7200
    assert yaml.safe_dump(made).count(f"image: {IMAGE}\n") == 3
    assert "image: drtune-ray" not in yaml.safe_dump(made)


def test_files__study_as_it_is_and_its_space(tmp_path: Path) -> None:
    space = tmp_path / "mine.yaml"
    space.write_text("parameters:\n  optim.backbone_lr: {float: [0.001, 0.1], log: true}  # mine\n")
    file = study(tmp_path, space=str(space))
    config, _, made = render_study(file, RenderOptions("kind-cpu", claim="storage")).objects
    assert config["data"] == {"study.yaml": file.read_text(), "space.yaml": space.read_text()}
    assert made["spec"]["entrypoint"] == (
        "drtune-ray tune /etc/drtune/study.yaml --storage /storage/studies --space "
        "/etc/drtune/space.yaml --set resources.trials_at_a_time=2 --set "
        "resources.cpus_per_worker=3"
    )


def test_secrets__the_driver_alone_opens_the_servers(tmp_path: Path) -> None:
    cluster = job(study(tmp_path, **SERVERS))["spec"]["rayClusterSpec"]
    pods = {
        "head": cluster["headGroupSpec"]["template"]["spec"]["containers"][0],
        "workers": cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0],
    }
    keys = {
        name: [v["valueFrom"]["secretKeyRef"]["key"] for v in pod["env"] if "valueFrom" in v]
        for name, pod in pods.items()
    }
    of_s3 = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    mlflow = ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]
    assert keys == {"head": ["PG", *mlflow, *of_s3], "workers": of_s3}


@pytest.mark.parametrize("render", RENDERS, ids=str)
def test_rendered__in_one_namespace(render: Render) -> None:
    assert [key(one)[0] for one in rendered(render)] == [
        "ConfigMap",
        "PodDisruptionBudget",
        "RayJob",
    ]
    assert {one["metadata"]["namespace"] for one in rendered(render)} == {"drtune-ray"}


# ---- refused


@pytest.mark.parametrize(
    ("servers", "missing"),
    [
        ({}, "optuna_storage, artifacts, tracking.uri"),
        ({"optuna_storage": SERVERS["optuna_storage"]}, "artifacts, tracking.uri"),
        (SERVERS | {"artifacts": "file:///storage/a"}, "artifacts"),
        (SERVERS | {"optuna_storage": "sqlite:////storage/o.db"}, "optuna_storage"),
        (SERVERS | {"tracking": {"uri": "sqlite:////storage/m.db"}}, "tracking.uri"),
    ],
)
def test_refused__a_study_that_a_pod_would_lose(
    tmp_path: Path, servers: dict[str, Any], missing: str
) -> None:
    file = study(
        tmp_path, **servers, trial={"data": {"train": "/data/f"}, "backbone": {"weights": "timm"}}
    )
    message = refusal(file, claim=None, data_claim="images")
    assert message.startswith("study 'flowers' would be on a pod's own disk")
    assert "give --claim NAME" in message
    assert message.endswith(f"or servers for {missing}")


def test_refused__all_at_once(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "storage": "./studies",
        "budget": {"max_seconds": 90000},
        "trial": {"data": {"train": "flowers"}, "backbone": {"weights": "demo"}},
    }
    assert refusal(study(tmp_path, **changes), overlay="gpu").splitlines() == [
        "storage='./studies' is not writable in a pod: leave it out, or put it below /storage",
        "data.train='flowers' does not exist in a pod: put the files on a volume, mount it with "
        "--claim (under /storage) or --data-claim (under /data), and set their path there",
        "backbone.weights='demo' is not in the image, which holds no weights: put a file on a "
        "volume and give its path",
        "overlay gpu has workers of group 'gpu', but a worker of the study needs 0 GPUs: set "
        "resources.gpus_per_worker, or use another overlay",
        "budget.max_seconds=90000 must be below the deadline of 24 hours, which includes the "
        "finals: raise --deadline-hours",
    ]


def test_refused__a_path_that_leaves_the_volume(tmp_path: Path) -> None:
    file = study(tmp_path, trial={"data": {"train": "/storage/../etc"}})
    assert refusal(file).startswith("data.train='/storage/../etc' does not exist in a pod")


def test_refused__names_that_kubernetes_does_not_take(tmp_path: Path) -> None:
    problem = (
        "is not a valid Kubernetes name: give up to 63 lower-case letters, digits and '-', with a "
        "letter or digit at both ends"
    )
    assert refusal(study(tmp_path), namespace="Mine", secret="a" * 64).splitlines() == [
        f"--namespace='Mine' {problem}",
        f"--secret='{'a' * 64}' {problem}",
    ]


@pytest.mark.parametrize(
    "image",
    [
        "",
        "a b",
        "a:1\n",
        "Drtune:1",
        "a:1 --privileged",
        "https://host/a:1",
        "a@sha256:0",
        "a//b:1",
    ],
)
def test_refused__what_is_no_image(tmp_path: Path, image: str) -> None:
    assert refusal(study(tmp_path), image=image) == (
        f"--image={image!r} is not the name of an image: write it like "
        "REGISTRY/drtune-ray:0.1.0-cuda or REGISTRY/drtune-ray@sha256:DIGEST"
    )


@pytest.mark.parametrize("image", ["drtune-ray", "host:5000/a/b", "host/a:latest"])
def test_refused__an_image_of_no_version(tmp_path: Path, image: str) -> None:
    assert refusal(study(tmp_path), image=image).startswith(f"--image={image} stands for another")
    assert job(study(tmp_path), image=f"{image.removesuffix(':latest')}:1-cuda")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("study", "ConfigMap study-file, PodDisruptionBudget study-head, RayJob study"),
        ("interactive", "PodDisruptionBudget interactive-head, RayCluster interactive"),
    ],
)
def test_refused__the_name_of_what_the_base_holds(tmp_path: Path, name: str, taken: str) -> None:
    """`kubectl apply` would have replaced it."""
    assert refusal(study(tmp_path, name=name)) == (
        f"study {name!r} would take the place of {taken} of deploy/base: give it another name"
    )


def test_refused__a_wrong_space(tmp_path: Path) -> None:
    file = study(tmp_path, space={"parameters": {"optim.backbone_lrr": {"float": [0.1, 1.0]}}})
    assert "optim.backbone_lrr" in refusal(file)


# ---- the command


def test_document__its_study_is_rendered(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (block,) = re.findall(r"```yaml\n# flowers.yaml\n(.*?)```", text, re.DOTALL)
    file = tmp_path / "flowers.yaml"
    file.write_text(block)
    (command,) = re.findall(r"^drtune-ray (deploy render .*?) > rayjob", text, re.M | re.S)
    arguments = shlex.split(command.replace("\\\n", " ").replace("flowers.yaml", str(file)))
    result = CliRunner().invoke(deploy, arguments[1:])
    assert result.exit_code == 0
    made = {one["kind"]: one for one in yaml.safe_load_all(result.stdout)}["RayJob"]
    assert made["metadata"]["name"] == "flowers"
    assert workers(made)["maxReplicas"] == 4


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_wheel__holds_what_render_reads(overlay: str) -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    folders = included["targets"]["wheel"]["force-include"]
    for part in ("base", "components", "overlays"):
        assert folders[f"deploy/{part}"] == f"drtune_ray/deploy/{part}"
    assert deploy_folder() == ROOT / "deploy"
    assert overlaid_rayjob(overlay)["kind"] == "RayJob"


def test_command__notes_go_to_stderr() -> None:
    arguments = ["render", str(STUDIES / "shared-volume.yaml"), "--overlay", "kind-cpu"]
    result = CliRunner().invoke(deploy, [*arguments, "--claim", "storage"])
    assert result.exit_code == 0
    assert result.stderr == (
        "resources.trials_at_a_time is not set: 2 trials at a time, on 2 pods\n"
    )
    assert result.stdout.startswith("---\napiVersion: v1\nkind: ConfigMap\n")
    assert "  study.yaml: |\n    # Everything on one volume" in result.stdout


def test_command__a_refusal_is_one_message_and_code_2(tmp_path: Path) -> None:
    command = "import sys; from drtune_ray.cli import main; sys.argv[0] = 'drtune-ray'; main()"
    arguments = ["deploy", "render", str(study(tmp_path)), "--overlay", "kind-cpu"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("drtune-ray: study 'flowers' would be on a pod's own disk")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("asked", "count"), [(1, 2), (5, 5), ([1, 6], 6), (None, 2)])
def test_the_pods_hold_the_final_fit_too(tmp_path: Path, asked: Any, count: int) -> None:
    final_fit = {"images": "all", "workers": asked}
    assert workers(job(study(tmp_path, final_fit=final_fit)))["maxReplicas"] == count
    final_fit["images"] = "none"
    assert workers(job(study(tmp_path, final_fit=final_fit)))["maxReplicas"] == 2
