"""Every method as a trial: its settings arrive, it resumes bit for bit, it counts what it reads."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from drtune_ray.config.method import READS, MethodConfig, MethodName
from drtune_ray.config.trial import TrialConfig
from drtune_ray.errors import ConfigError
from drtune_ray.method import Method
from drtune_ray.results.used_settings import unused_settings
from drtune_ray.training.checkpoint import TrialFolder, read_checkpoint
from drtune_ray.training.loop import train_epochs
from drtune_ray.training.methods import (
    METHODS,
    NEED_WHOLE_BATCH,
    check_method,
    inner_layers,
    own_class,
)
from drtune_ray.training.model import check_trial
from drtune_ray.training.reports import COMPLETED, EpochReport
from drtune_ray.training.trial import Trial
from tests.small import prepared, small_trial, small_values, write_coloured

CPU = torch.device("cpu")
NAMES = sorted(set(METHODS) - {"dr_tune", "ce_tuning"})  # these are in the other tests
EPOCHS = 3


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def values(storage: Path, weights_file) -> dict[str, Any]:
    images = write_coloured(storage / "images", per_class=6)
    small = small_values(images, weights_file) | {"training.batch_size": 4}
    return small | {"training.epochs": EPOCHS, "optim.backbone_lr": 0.005}


@pytest.fixture(scope="module")
def make(storage: Path, values: dict[str, Any]) -> Callable[..., Trial]:
    def make(name: str, **changes: Any) -> Trial:
        config = small_trial(values | {"method.name": name} | changes)
        data, backbone, _ = prepared(config, storage)
        return Trial(config, data, backbone, CPU)

    return make


@pytest.fixture(scope="module")
def unbroken(values: dict[str, Any], storage: Path) -> Callable[[str], list[Any]]:
    @functools.cache
    def run(name: str) -> list[Any]:
        config = small_trial(values | {"method.name": name})
        data, backbone, _ = prepared(config, storage)
        return list(train_epochs(config, data, backbone, num_threads=1))

    return run


def told(events: list[Any]) -> list[Any]:
    last = [event for event in events if isinstance(event, EpochReport)][-1]
    timeless = [
        {name: value for name, value in record.metrics.items() if name != "seconds"}
        for record in last.history
    ]
    return [last.outcome, [record.steps for record in last.history], timeless]


# ---- all methods


def test_there_is_a_builder_for_each_name() -> None:
    assert set(METHODS) == set(get_args(MethodName))
    fields = set(MethodConfig.model_fields) - {"name", "head_lr_multiplier"}
    assert {setting for reads in READS.values() for setting in reads} == fields


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_to_the_end_and_its_loss_falls(unbroken: Any, name: str) -> None:
    outcome, steps, metrics = told(unbroken(name))
    assert outcome == COMPLETED and len(steps) == EPOCHS
    assert metrics[-1]["cross_entropy"] < metrics[0]["cross_entropy"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop_after", [2, 6])
def test_resumed_it_equals_the_unbroken_run(
    values: dict[str, Any], storage: Path, unbroken: Any, tmp_path: Path, name: str, stop_after: int
) -> None:
    config = small_trial(values | {"method.name": name})
    data, backbone, _ = prepared(config, storage)
    folder = TrialFolder(tmp_path / "trial")
    asked = train_epochs(config, data, backbone, num_threads=1, save_requested=lambda: True)
    for count, event in enumerate(asked, start=1):
        event.save(folder)
        if count == stop_after:
            break
    resumed = train_epochs(config, data, backbone, num_threads=1, resume=folder.newest())
    assert told(list(resumed)) == told(unbroken(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_that_it_reads_are_its_own(name: str) -> None:
    config = small_trial({"data.train": "images", "method.name": name})
    ignored = {p.split(".")[1] for p in unused_settings(config) if p.startswith("method.")}
    read = set(MethodConfig.model_fields) - ignored | ({"calibration"} & set(READS.get(name, ())))
    assert read == {"name", "head_lr_multiplier", *READS.get(name, ())}


@pytest.mark.parametrize("name", NEED_WHOLE_BATCH)
def test_a_method_that_needs_the_whole_batch_is_refused_in_parts(name: str) -> None:
    config = small_trial({"data.train": "images", "method.name": name})
    assert check_method(config) == []
    config = config.with_values({"training.accumulation_steps": 2})
    (problem,) = check_trial(config, 100)
    assert problem.endswith("but got training.accumulation_steps=2: set it to 1")


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_every_part_of_the_recipe(make: Callable[..., Trial], name: str) -> None:
    recipe = {
        "training.precision": "bfloat16",
        "training.ema_decay": 0.5,
        "training.mixup": 0.4,
        "training.label_smoothing": 0.1,
        "optim.clip_norm": 1.0,
        "optim.name": "adamw",
        "data.views": 0,
        "backbone.frozen_layers": 1,
    }
    trial = make(name, **recipe)
    trial.warm_up_bank()
    for _ in range(2):
        assert all(trial.steps())
        trial.finish_epoch()
    assert trial.progress.outcome is None
    assert all(t.isfinite().all() for t in trial.method.state_dict().values() if hasattr(t, "dim"))


# ---- their settings


def test_penalties_get_their_weights(make: Callable[..., Trial]) -> None:
    weights = {"method.l2_sp_weight": 0.5, "method.l2_sp_head_weight": 0.25}
    for name in ("l2_sp", "dr_tune_l2_sp"):
        penalty: Any = make(name, **weights).method.penalties["l2_sp"]
        assert (penalty.weight, penalty.head_weight) == (0.5, 0.25)
    weights = {"method.bss_weight": 0.5, "method.bss_num_values": 3}
    for name in ("bss", "dr_tune_bss"):
        penalty = make(name, **weights).method.penalties["bss"]
        assert (penalty.weight, penalty.num_values) == (0.5, 3)


def test_dr_has_a_bank_and_no_calibration(make: Callable[..., Trial]) -> None:
    method: Any = make("dr").method
    assert method.calibration is None and method.bank.bank_size == 12


def test_the_encoder_of_a_linear_probe_stays_as_it_is(make: Callable[..., Trial]) -> None:
    trial = make("linear_probe", **{"training.batch_norm": "local"})
    before = {n: t.clone() for n, t in trial.method.downstream_encoder.state_dict().items()}
    head = trial.method.head.weight.clone()
    assert all(trial.steps())
    after = trial.method.downstream_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(head, trial.method.head.weight)


def test_bitfit_moves_biases_and_norms_alone(make: Callable[..., Trial]) -> None:
    encoder = make("bitfit").method.downstream_encoder
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained and all("bn" in name or name.endswith("bias") for name in trained)
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen and all(name.endswith("weight") for name in frozen)


def test_ldifs_reads_up_to_five_layers(make: Callable[..., Trial]) -> None:
    assert list(make("ldifs").method.layers) == [*(f"blocks.{n}" for n in range(5)), ""]
    known = make("ldifs", **{"backbone.name": "test_efficientnet"}).method
    frozen = [name for name in known.state_dict() if name.startswith("pretrained_encoder.")]
    assert frozen and not any(name in Path("x").parts for name in frozen)


def test_ldifs_names_what_it_cannot_read() -> None:
    with pytest.raises(ConfigError, match="timm names no layers"):
        inner_layers(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)), 4)
    config = small_trial({"data.train": "images", "method.name": "ldifs", "training.compile": True})
    (problem,) = check_method(config)
    assert problem.endswith("set training.compile=false")


@pytest.mark.parametrize(("share", "epochs", "wanted"), [(0.5, 4, 2), (0.01, 4, 1), (0.99, 4, 3)])
def test_lp_ft_probes_for_a_share_of_the_epochs(
    make: Callable[..., Trial], share: float, epochs: int, wanted: int
) -> None:
    changes = {"method.probe_share": share, "training.epochs": epochs}
    assert make("lp_ft", **changes).method.probe_epochs == wanted


def test_lp_ft_leaves_the_encoder_alone_while_it_probes(make: Callable[..., Trial]) -> None:
    trial = make("lp_ft", **{"optim.weight_decay": 0.1, "method.probe_share": 0.01})
    encoder = trial.method.downstream_encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for is_kept in (True, False):
        assert all(trial.steps())
        trial.finish_epoch()
        same = all(torch.equal(before[n], value) for n, value in encoder.state_dict().items())
        assert same == is_kept


def test_wise_ft_keeps_the_model_that_validated_best(
    make: Callable[..., Trial], tmp_path: Path
) -> None:
    trial = make("wise_ft", **{"method.probe_share": 0.01, "training.metric": "log_loss"})
    for _ in range(2):
        assert all(trial.steps())
        trial.finish_epoch()
    losses = []
    for index in range(11):
        measures, answers = trial._measured(*trial.method.candidate(index, *trial._trained))
        losses.append(measures["val_loss"])
        if index == trial.method.chosen:
            assert torch.equal(answers, trial.answers)
    assert len(set(losses)) == 11 and losses.index(min(losses)) == trial.method.chosen
    metrics = trial.progress.history[-1]["metrics"]
    assert metrics["val_loss"] == min(losses)
    assert metrics["coefficient"] == pytest.approx(1 - trial.method.chosen / 10)
    trial.is_best = True
    folder = TrialFolder(tmp_path)
    folder.begin("a trial")
    trial.writer.save(folder)
    encoder, head = trial.method.candidate(trial.method.chosen, *trial._trained)
    kept = read_checkpoint(folder.best)["model"]
    for name, tensor in kept.items():
        part, _, rest = name.partition(".")
        assert torch.equal(tensor, {"encoder": encoder, "head": head}[part].state_dict()[rest])


# ---- one's own


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example of docs/methods.md as an importable module; returns its import path."""
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    (tmp_path / "my_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    return "my_package.MyMethod"


def test_the_documented_example_trains(make: Callable[..., Trial], documented: str) -> None:
    trial = make(documented)
    plain = make("ce_tuning")
    for each in (trial, plain):
        assert all(each.steps())
        each.finish_epoch()
    found = trial.report().history[0].metrics
    assert found["confidence"] != 0
    assert found["loss"] == pytest.approx(found["cross_entropy"] + found["confidence"])
    assert found["cross_entropy"] != plain.report().history[0].metrics["cross_entropy"]
    assert unused_settings(trial.config) == unused_settings(plain.config)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package.MyMethod", "ModuleNotFoundError"),
        ("drtune_ray.method.NoSuchMethod", "AttributeError"),
        ("pathlib.Path", "not a subclass of drtune_ray.method.Method"),
        ("broken_module.MyMethod", "SyntaxError"),
    ],
)
def test_what_is_no_method_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    (tmp_path / "broken_module.py").write_text("class MyMethod(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = small_trial({"data.train": "images", "method.name": path})
    (problem,) = check_method(config)
    assert path in problem and said in problem
    with pytest.raises(ConfigError):
        own_class(path)


@pytest.mark.parametrize(
    "name", ["../evil.MyMethod", "evil.py:MyMethod", "MyMethod", "a..B", "a b.C"]
)
def test_only_import_paths_are_taken_never_files(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no method"):
        small_trial({"data.train": "images", "method.name": name})


def test_reading_settings_imports_no_method(documented: str) -> None:
    config: TrialConfig = small_trial({"data.train": "images", "method.name": documented})
    unused_settings(config)
    TrialConfig.from_mapping(config.to_mapping())
    assert "my_package" not in sys.modules
    assert issubclass(own_class(documented), Method) and "my_package" in sys.modules
