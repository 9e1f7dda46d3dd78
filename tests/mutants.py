"""Small wrong changes of the method and the training that the tests must notice.

``make test-mutants`` applies them one by one to a copy of the project and runs the tests named
with each. A mutant that no test notices survives: the exit code is 1 then.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("drtune_ray", "search_spaces", "tests", "pyproject.toml")


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
MODEL, GROUP = "training/model.py", "training/distributed.py"
RECIPE, OF_BANK = "tests/training/test_recipe.py", "tests/method/test_feature_bank.py"
PROCESSES = "tests/training/test_distributed.py"


def not_passed(setting: str) -> Mutant:
    """A setting of the calibration that does not reach the method."""
    line = f"            {setting}=calibration.{setting},\n"
    return Mutant(f"{setting} is not passed on", MODEL, line, "", RECIPE)


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
        "for row in batch][: self.method.bank.bank_size]",
        "for row in batch][-self.method.bank.bank_size :]",
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
        TRIAL,
        "        self.schedule.step()\n",
        "        self.schedule.step()\n        self.schedule.step()\n",
        RECIPE,
    ),
    Mutant(
        "rates are recorded after the step",
        TRIAL,
        "        self.progress.last_rates = learning_rates(self.optimizer)\n"
        "        self.schedule.step()\n",
        "        self.schedule.step()\n"
        "        self.progress.last_rates = learning_rates(self.optimizer)\n",
        RECIPE,
    ),
    Mutant(
        "steps an epoch are counted with the last batch",
        TRIAL,
        "self.steps_per_epoch = len(self._global_batches(0))",
        "self.steps_per_epoch = len(self._global_batches(0, drop_last=False))",
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
        TRIAL,
        'generator(self.config.seed, "order", epoch)',
        'generator(self.config.seed, "order")',
        RECIPE,
    ),
    Mutant(
        "pixels are not divided by 255",
        "training/frozen_features.py",
        ".float().div_(255.0)",
        ".float()",
        RECIPE,
    ),
    Mutant(
        "the scale is adapted before the step",
        TRIAL,
        "        self.scaler.step(self.optimizer)\n        self.scaler.update()\n",
        "        self.scaler.update()\n        self.scaler.step(self.optimizer)\n",
        RECIPE,
    ),
    Mutant(
        "a step without autocast",
        TRIAL,
        "            with self._autocast():\n                output = self.module",
        "            if True:\n                output = self.module",
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
        "            with self._autocast():\n                self.method.warm_up_bank",
        "            if True:\n                self.method.warm_up_bank",
        RECIPE,
    ),
    Mutant(
        "reduction is not passed on",
        MODEL,
        "        reduction=config.method.reduction,\n",
        "",
        RECIPE,
    ),
    *map(
        not_passed,
        (
            "rotation_rank",
            "rotation_shrinkage",
            "recenter",
            "normalize",
            "confidence_temperature",
            "similarity",
        ),
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
        TRIAL,
        "totals.measures(self.group.sum(totals.sums))",
        "totals.measures(totals.sums)",
        PROCESSES,
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
        "[self.group.rank :: self.group.world_size]\n        batches",
        "\n        batches",
        RECIPE,
    ),
)


def main() -> None:
    """Print what became of each mutant."""
    wanted = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if wanted in mutant.what]
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
        command = [sys.executable, "-m", "pytest", "-x", "-q", *mutant.tests.split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(sound)
    # 1: a test failed; whatever else would be an error of the run.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    print("noticed " if done.returncode else "SURVIVED", mutant.what, flush=True)
    return bool(done.returncode)


if __name__ == "__main__":
    main()
