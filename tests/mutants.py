"""Small wrong changes of the method and the training that the tests must notice.

``make test-mutants`` applies them one by one to a copy of the project and runs the tests named
with each. A mutant that no test notices survives: the exit code is 1 then.
``python -m tests.mutants WORD`` takes those whose description holds the word.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("drtune_ray", "search_spaces", "tests", "pyproject.toml")
# Some five seconds of imports that the tests of every mutant need.
IMPORTED_ONCE = ("timm", "torch._dynamo", "pyarrow", "pydantic", "scipy.stats", "sklearn.metrics")


@dataclass(frozen=True)
class Mutant:
    """A change of one place.

    Attributes:
        what: What becomes wrong.
        file: File of the package.
        old: Text that stands there exactly once.
        new: Text in its place.
        tests: What must fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str


BANK, TRIAL = "method/feature_bank.py", "training/trial.py"
BATCHES, SAVED = "training/batches.py", "training/saving.py"
METHODS = "training/methods.py"
DR_TUNE = "method/dr_tune.py"
METHODS_TESTS = "tests/method/test_methods.py"
MODEL, GROUP = "training/model.py", "training/distributed.py"
RECIPE, OF_BANK = "tests/training/test_recipe.py", "tests/method/test_feature_bank.py"
PROCESSES = "tests/training/test_distributed.py"
GOLDEN, WIRING = "tests/training/test_golden_trial.py", "tests/training/test_wiring.py"
TARGETS, MIXING = "tests/method/test_targets.py", "tests/training/test_mixing.py"
BALANCE = "tests/training/test_class_balance.py"
SAVING, OPTIM = "tests/training/test_saving.py", "training/optim.py"
UPDATES = "tests/training/test_updates.py"
VALIDATION, METRICS = "training/validation.py", "tests/training/test_validation.py"
UPDATE, SCHEDULES = "training/update.py", "training/schedules.py"


def not_passed(setting: str) -> Mutant:
    """A setting of the calibration that does not reach the method."""
    line = f"        {setting}=calibration.{setting},\n"
    tests = f"{WIRING} -k calibration.{setting}"
    return Mutant(f"{setting} is not passed on", METHODS, line, "", tests)


MUTANTS = (
    Mutant(
        "a batch longer than the bank keeps its oldest rows",
        BANK,
        "new[first:]",
        "new[:num_kept]",
        OF_BANK,
    ),
    Mutant("the oldest row comes last", BANK, "shift = -self._position", "shift = 0", OF_BANK),
    Mutant(
        "warm-up takes the last K of the pass",
        TRIAL,
        "for row in batch][: self.method.num_warm_up_rows]",
        "for row in batch][-self.method.num_warm_up_rows :]",
        RECIPE,
    ),
    Mutant(
        "warm-up again on resume",
        "training/loop.py",
        "        trial.load_state(resume)\n",
        "        trial.warm_up_bank()\n        trial.load_state(resume)\n",
        RECIPE,
    ),
    Mutant(
        "the schedule steps twice",
        UPDATE,
        "        self.schedule.step()\n",
        "        self.schedule.step()\n        self.schedule.step()\n",
        RECIPE,
    ),
    Mutant(
        "rates are recorded after the step",
        UPDATE,
        "        self.rates = learning_rates(self.optimizer)\n        self.schedule.step()\n",
        "        self.schedule.step()\n        self.rates = learning_rates(self.optimizer)\n",
        RECIPE,
    ),
    Mutant(
        "steps an epoch are counted with the last batch",
        TRIAL,
        "self.steps_per_epoch = len(self.batches.rows(0))",
        "self.steps_per_epoch = len(self.batches.rows(0, drop_last=False))",
        RECIPE,
    ),
    Mutant(
        "validation in train mode",
        TRIAL,
        "        self.method.eval()\n",
        "        self.method.train()\n",
        RECIPE,
    ),
    Mutant(
        "the same order in every epoch",
        BATCHES,
        'generator(self._config.seed, "order", epoch)',
        'generator(self._config.seed, "order")',
        RECIPE,
    ),
    Mutant(
        "pixels are not divided by 255",
        "training/frozen_features.py",
        ".div_(255.0)",
        "",
        RECIPE,
    ),
    Mutant(
        "the scale is adapted before the step",
        UPDATE,
        "        self.scaler.step(self.optimizer)\n        self.scaler.update()\n",
        "        self.scaler.update()\n        self.scaler.step(self.optimizer)\n",
        RECIPE,
    ),
    Mutant(
        "a step without autocast",
        TRIAL,
        "        with self._autocast():\n            output = self.module",
        "        if True:\n            output = self.module",
        RECIPE,
    ),
    Mutant(
        "validation without autocast",
        TRIAL,
        "            with self._autocast():\n                logits =",
        "            if True:\n                logits =",
        RECIPE,
    ),
    Mutant(
        "warm-up without autocast",
        TRIAL,
        "            with self._autocast():\n                self.method.warm_up",
        "            if True:\n                self.method.warm_up",
        RECIPE,
    ),
    Mutant(
        "reduction is not passed on",
        METHODS,
        "        reduction=config.method.reduction,\n",
        "",
        f"{WIRING} -k method.reduction",
    ),
    *map(
        not_passed,
        (
            "rotation",
            "rotation_interval",
            "rotation_solver",
            "rotation_rank",
            "rotation_shrinkage",
            "rotation_kept",
            "proper_rotation",
            "recenter",
            "normalize",
            "translation",
            "confidence_weighting",
            "confidence_temperature",
            "similarity",
        ),
    ),
    Mutant(
        "restart_each_epoch is not passed on",
        METHODS,
        "        restart_each_epoch=calibration.rotation_restarts_each_epoch,\n",
        "",
        f"{WIRING} -k rotation_restarts",
    ),
    Mutant(
        "lambda is not passed on",
        METHODS,
        "        regularization_weight=parts.scale.regularization_weight,\n",
        "",
        f"{WIRING} -k regularization",
    ),
    Mutant(
        "nesterov is not passed on",
        OPTIM,
        ", nesterov=config.nesterov",
        "",
        f"{WIRING} -k nesterov",
    ),
    Mutant(
        "momentum is fixed",
        OPTIM,
        "momentum=config.momentum",
        "momentum=0.9",
        f"{WIRING} -k momentum",
    ),
    Mutant(
        "no setting decays",
        OPTIM,
        '"weight_decay": config.weight_decay',
        '"weight_decay": 0.0',
        f"{WIRING} -k weight_decay",
    ),
    Mutant(
        "the head learns at the backbone's rate",
        OPTIM,
        "config.backbone_lr * head_lr_multiplier",
        "config.backbone_lr",
        f"{WIRING} -k head_lr",
    ),
    Mutant(
        "BatchNorm is always frozen",
        MODEL,
        '    if batch_norm == "frozen":\n',
        "    if True:\n",
        f"{WIRING} -k batch_norm",
    ),
    Mutant(
        "save points are never due by time",
        "training/loop.py",
        "time.monotonic() - last_save > config.save_every_seconds or save_requested()",
        "save_requested()",
        f"{WIRING} -k save_every",
    ),
    Mutant(
        "patience is ignored", TRIAL, "elif patience and", "elif False and", f"{WIRING} -k patience"
    ),
    # ---- the whole trial against a plain loop
    Mutant("pixels are divided by 256", "training/frozen_features.py", "255.0", "256.0", GOLDEN),
    Mutant(
        "images of a float64 trial are normalised in float32",
        TRIAL,
        "Normalizer(backbone.normalization, device, self.dtype)",
        "Normalizer(backbone.normalization, device)",
        GOLDEN,
    ),
    Mutant(
        "BatchNorm is folded in float32",
        METHODS,
        "self.backbone.build_frozen(self.dtype)",
        "self.backbone.build_frozen()",
        GOLDEN,
    ),
    Mutant(
        "position embeddings decay",
        OPTIM,
        " or any(fnmatchcase(name, pattern) for pattern in patterns)",
        "",
        GOLDEN,
    ),
    Mutant(
        "the same view in every epoch",
        TRIAL,
        "self._inputs(parts, progress.epochs_done)",
        "self._inputs(parts, 0)",
        GOLDEN,
    ),
    Mutant(
        "the epoch's start is not passed to the method",
        TRIAL,
        "            self.method.begin_epoch()\n",
        "            pass\n",
        GOLDEN,
    ),
    Mutant(
        "the schedule of each epoch counts from the step before",
        SCHEDULES,
        "epoch = step // steps_per_epoch",
        "epoch = (step + 1) // steps_per_epoch",
        GOLDEN,
    ),
    Mutant(
        "the best epoch is the last that is no worse",
        TRIAL,
        "metric.score(value) > metric.score(best)",
        "metric.score(value) >= metric.score(best)",
        "tests/training/test_loop.py -k patience",
    ),
    Mutant(
        "the norm of the calibrated rows is 1",
        "method/dr_tune.py",
        "else self._regularization(scale)",
        "else self._regularization(torch.ones_like(scale))",
        GOLDEN,
    ),
    # ---- checkpoints beside the steps
    Mutant(
        "a checkpoint is written from the state that trains on",
        SAVED,
        "self._write_of(self._unsaved, copied(state))",
        "self._write_of(self._unsaved, state)",
        SAVING,
    ),
    Mutant(
        "an error of the writer is lost",
        SAVED,
        "            writing.result()\n",
        "            writing.exception()\n",
        SAVING,
    ),
    Mutant(
        "the end of a trial does not wait for its checkpoint",
        TRIAL,
        "self.writer.save_later if outcome is None else self.writer.save",
        "self.writer.save_later",
        SAVING,
    ),
    Mutant(
        "a checkpoint is written before its epoch is reported",
        TRIAL,
        "self.writer.save_later if outcome is None else self.writer.save",
        "self.writer.save",
        SAVING,
    ),
    # ---- the recipe
    Mutant(
        "the warmup reaches the full rates a step late",
        SCHEDULES,
        "return (step + 1) / (warmup_steps + 1)",
        "return step / (warmup_steps + 1)",
        "tests/training/test_schedules.py",
    ),
    Mutant(
        "the schedule runs during the warmup",
        SCHEDULES,
        "(num_epochs - config.warmup_epochs)",
        "num_epochs",
        "tests/training/test_schedules.py",
    ),
    Mutant(
        "the rate of the last layer is the head's",
        "training/layers.py",
        "decay ** (last - number)",
        "decay ** (last - 1 - number)",
        "tests/training/test_layers.py",
    ),
    Mutant(
        "scaled gradients are clipped",
        UPDATE,
        "        self.scaler.unscale_(self.optimizer)\n",
        "",
        f"{UPDATES} -k scaled",
    ),
    Mutant(
        "each part replaces the gradients",
        UPDATE,
        "        if not self._accumulates:\n",
        "        if True:\n",
        f"{UPDATES} -k accumulated",
    ),
    Mutant(
        "a part is weighted by its own rows",
        "method/collective.py",
        "sum(self.shares) if self.micro is None else self.micro.num_rows",
        "sum(self.shares)",
        f"{UPDATES} -k accumulated",
    ),
    Mutant(
        "the norms of the earlier parts are lost",
        "method/dr_tune.py",
        "sum(earlier, norms)",
        "norms",
        f"{UPDATES} -k accumulated",
    ),
    Mutant(
        "the schedule follows a skipped step",
        UPDATE,
        "            return False\n        self.rates",
        "            pass\n        self.rates",
        f"{UPDATES} -k overflow",
    ),
    Mutant(
        "the batch of a skipped step enters the bank",
        DR_TUNE,
        "self.enqueue_batch() if is_taken else self.drop_batch()",
        "self.enqueue_batch()",
        f"{UPDATES} -k overflow",
    ),
    Mutant(
        "the trained weights are validated",
        TRIAL,
        "            return self.average.encoder, self.average.head\n",
        "            pass\n",
        f"{UPDATES} -k average",
    ),
    Mutant(
        "the average is not resumed",
        SAVED,
        '        trial.average.load_state_dict(state["average"])\n',
        "        pass\n",
        f"{UPDATES} -k average",
    ),
    Mutant(
        "frozen layers are in train mode",
        MODEL,
        "        if parameters and not any(",
        "        if False and not any(",
        f"{UPDATES} -k frozen",
    ),
    # ---- of several processes
    Mutant(
        "padding is kept",
        GROUP,
        "torch.cat([part[:share] for part,",
        "torch.cat([part for part,",
        PROCESSES,
    ),
    Mutant(
        "the sum of the validation is skipped",
        VALIDATION,
        "self._sums.copy_(collective.sum(self._sums))",
        "pass",
        PROCESSES,
    ),
    Mutant(
        "false positives do not count in F1",
        VALIDATION,
        "(self._count[seen] + self._predicted[seen])",
        "(self._count[seen] + self._correct[seen])",
        METRICS,
    ),
    Mutant(
        "a tie of scores counts in full",
        VALIDATION,
        "(below + below_or_equal).sum()",
        "(2 * below_or_equal).sum()",
        METRICS,
    ),
    Mutant(
        "the parts of the loss are not divided by the number of processes",
        TRIAL,
        "        values[:, :-1] /= self.group.world_size\n",
        "",
        PROCESSES,
    ),
    Mutant(
        "every process validates every image",
        TRIAL,
        "rows = list(parts[self.group.rank])",
        "rows = list(range(num_images))",
        RECIPE,
    ),
    Mutant(
        "DR does not weigh the classes",
        "method/dr_tune.py",
        "                block.divisor,\n                class_weights=self.class_weights,\n",
        "                block.divisor,\n",
        TARGETS,
    ),
    Mutant(
        "the bank takes mixed images",
        "method/dr_tune.py",
        "(trained if unmixed is None else unmixed)[batch.own]",
        "trained[batch.own]",
        TARGETS,
    ),
    Mutant(
        "smoothing is not passed on",
        METHODS,
        '"label_smoothing": config.training.label_smoothing, ',
        "",
        f"{WIRING} -k label_smoothing",
    ),
    Mutant(
        "the same mixing at every step",
        "training/mixing.py",
        '"mixing", epoch, step)',
        '"mixing", epoch)',
        MIXING,
    ),
    Mutant(
        "the last of an odd number is not mixed",
        "training/mixing.py",
        "max(0, at - 1)",
        "at",
        MIXING,
    ),
    Mutant(
        "hits of mixed images count the own label",
        TRIAL,
        "labels if mixed is None else mixed.targets.argmax(1)",
        "labels",
        "tests/training/test_data_and_loss.py",
    ),
    Mutant(
        "a repeated image is the same view",
        "data/dataset.py",
        "(view + repetition) % self.num_views",
        "view",
        BALANCE,
    ),
    Mutant(
        "the surplus draws go to the same classes",
        "training/class_balance.py",
        "torch.randperm(len(by_class), generator=generator) < num_longer",
        "torch.arange(len(by_class)) < num_longer",
        BALANCE,
    ),
    Mutant(
        "weights are not divided by the number of classes",
        "training/class_balance.py",
        "((counts > 0).sum() * np.maximum(counts, 1))",
        "np.maximum(counts, 1)",
        BALANCE,
    ),
    Mutant(
        "trials that erase read the tables of others",
        "config/trial.py",
        '    "data.random_erasing",\n',
        "",
        "tests/study/test_variants.py",
    ),
    Mutant(
        "L2-SP counts with each part of a batch",
        "method/penalties.py",
        "        if not batch.is_last:\n",
        "        if False:\n",
        METHODS_TESTS,
    ),
    Mutant(
        "a term of the whole batch has the gradient of one process",
        "method/penalties.py",
        " * collective.world_size\n",
        "\n",
        METHODS_TESTS,
    ),
    Mutant(
        "a probe's encoder decays",
        "method/probing.py",
        "                parameter.grad = None\n",
        "                pass\n",
        METHODS_TESTS,
    ),
    Mutant(
        "SPD projects where the gradient points away",
        "method/projection.py",
        "(condition < 0)",
        "(condition > 0)",
        METHODS_TESTS,
    ),
    Mutant(
        "FTP forgets its steps",
        "method/projection.py",
        "        self.num_steps = state\n",
        "        pass\n",
        "tests/training/test_methods.py -k resumed",
    ),
    Mutant(
        "WiSE-FT keeps the last coefficient",
        TRIAL,
        "            if not found or metric.score(",
        "            if True or metric.score(",
        "tests/training/test_methods.py -k wise",
    ),
)


def main() -> None:
    """Print what became of each mutant."""
    wanted = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.what]
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        survivors = [mutant.what for mutant in chosen if not is_noticed(mutant, copy)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were noticed")
    sys.exit(1 if survivors else 0)


def is_noticed(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests fail with a mutant in place."""
    path = copy / "drtune_ray" / mutant.file
    sound = path.read_text()
    assert sound.count(mutant.old) == 1, f"{mutant.what}: its text is not in {mutant.file} once"
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        code, output = run_tests(mutant.tests.split(), copy)
    finally:
        path.write_text(sound)
    # 1: a test failed; whatever else would be an error of the run.
    assert code in (0, 1), output
    print("noticed " if code else "SURVIVED", mutant.what, flush=True)
    return bool(code)


def run_tests(tests: list[str], copy: Path) -> tuple[int, str]:
    """Run tests in a forked process, which has the large packages already; code and output."""
    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(
            target=_pytest, args=(tests, copy, log)
        )
        process.start()
        process.join()
        log.seek(0)
        return process.exitcode or 0, log.read()


def _pytest(tests: list[str], copy: Path, log: TextIO) -> None:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.chdir(copy)
    # This package is the copy's from here on, also in the processes that a test starts.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "drtune_ray")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(copy)
    # What was imported before pytest began cannot have its assertions rewritten.
    rewriting = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    try:
        code = int(pytest.main(["-x", "-q", *rewriting, *tests]))
    except BaseException:
        traceback.print_exc()
        code = int(pytest.ExitCode.INTERNAL_ERROR)  # not 1, which says that a test failed
    sys.exit(code)


if __name__ == "__main__":
    main()
