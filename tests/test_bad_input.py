"""Every rule about input has an example that breaks it, with the exact message, and code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from drtune_ray.cli.main import cli, main
from drtune_ray.config.section import Section
from drtune_ray.config.study import StudyConfig
from tests import bad_places
from tests.bad_input import Example, all_examples
from tests.rules import (
    PACKAGE,
    Rule,
    option_rules,
    refuses,
    sentence_rules,
    setting_rules,
    without_example,
    wordless,
)
from tests.small import BACKBONE, write_coloured

EXAMPLES = all_examples()
BY_NAME = {example.name: example for example in EXAMPLES}
# Left by looking into a study that was begun before: its lock, and the storages that it names.
LEFT_BY_A_DRIVER = {"driver.lock", "driver.txt", "optuna.journal", "search.db", "artifacts"}
# Whose rules tests/space/test_space_problems.py holds.
NOT_OF_SPACES = "space/search_space.py"  # of all that lies in space/
# Functions of refusing modules whose sentences are about other things.
NOT_OF_INPUT = {
    "study/winner.py:WinnerWriter._train",
    "study/winner.py:WinnerWriter._trained_again",
    "study/winner.py:WinnerWriter._weights",
    "data/kinds/rows.py:_unused_names",
    "data/prepare.py:_shards",
    "data/kinds/shards.py:_note",
    "data/kinds/tar_shards.py:_note",
    "data/splits.py:_notes_on_given",
    "data/splits.py:_shared_training",
    "cli/compare.py:_run.say",
    "data/splits.py:_notes_on_lacking",
    "cli/jobs.py:_follow",
    "cli/jobs.py:_server",
    "jobs/attempts.py:_short",
    "jobs/attempts.py:end_of",  # of a job
    "manifests/render.py:_notes",
    "manifests/service.py:_note",
    "jobs/submission.py:_notes",
    "folders.py:probe_folder",  # exit code 3
    "results/winner.py:_read_card",  # exit code 3
    "study/driver.py:StudyDriver._finish",
    "execution/serve_app.py:ImageService",  # of requests: tests/execution/test_serving.py
    "execution/capacity.py:Capacity.__str__",
    "execution/capacity.py:NodeGroup.__str__",
    "study/inputs.py:StudyInputs.summary",
    "study/tables.py:preparing_device",
    "study/training_run.py:_Training._train_and_write",
    "space/search_space.py:SearchSpace.clamped",
    "config/section.py:refusal",  # the form of the settings' messages, which have own rules
    "tracking/mlflow_recorder.py:MlflowRecorder._search",  # what MLflow is searched for
    "tracking/mlflow_recorder.py:ignored_variables",
    "tracking/model_registry.py:_comparison",
    "tracking/model_registry.py:_logged",  # what MLflow is searched for
    "tracking/model_registry.py:_write",  # a warning
    "training/backbones.py:_hub_problem",
    "training/backbones.py:note_on",
    "cli/weights.py:backbones",
    "training/checkpoint.py:TrialFolder.save",
    "training/weights_loading.py:KeyReport.__str__",
}
JOBS = "of the jobs that a job server knows: tests/jobs/test_unknown_jobs.py"
OF_SPLITS = "of a file that only the package writes: tests/data/test_splits.py"
OWN_FILES = "of a file that only the package writes: tests/training/test_checkpoint.py"
IN_SHARDS = "why an image cannot be read: tests/data/test_kinds.py"
WINNER = "of the weights of a trial that was trained: tests/study/test_damaged_files.py"
# Sentences that no command line shows, each with the reason.
WITHOUT_EXAMPLE = {
    "the installed timm cannot build optim.name=x (x): install timm 1.0.20 or later, or choose sgd "
    "or adamw": "of an older timm: tests/training/test_optimizers.py",
    "timm names no layers of this backbone whose features can be read: choose another "
    "backbone.name or method.name": "of few backbones: tests/training/test_methods.py",
    "not as many outputs as classes": WINNER,
    "no bytes in column x": IN_SHARDS,
    "row x does not exist": IN_SHARDS,
    "no such member": IN_SHARDS,
    "larger than 1 GiB": IN_SHARDS,
    "the shard is cut off": IN_SHARDS,
    "an array must be uint8 of shape (H, W, 3) or (H, W), but is x of shape x": (
        "from Python: tests/results/test_predict.py"
    ),
    "the name of x cannot be read in this locale, whose encoding is x: set PYTHONUTF8=1": (
        "of a process with another locale: tests/data/test_sources.py"
    ),
    "columns are missing": OF_SPLITS,
    "values are missing": OF_SPLITS,
    "a split is unknown": OF_SPLITS,
    "x is missing: repeat the command to write it again": OF_SPLITS,
    "the test images of x are not the same, since earlier studies in x had fewer images: use "
    "another --storage": "of images that were added: tests/study/test_comparison_run.py",
    "x is not a study: it holds no x": "commands look for that file first",
    "x says that the study is done, but something is left to run: remove that file": (
        "of a study that was run to its end and then lost trials in its storage"
    ),
    "backbone.name=x gives features of shape x instead of (1, D): choose a backbone that pools "
    "its features": "no model of timm 1.0 is known to do it",
    "no study xx was submitted to x": JOBS,
    "; it has x": JOBS,
    "studies named x were submitted with the storages x: choose one with --storage": JOBS,
    "study x has no attempt x: there are x": JOBS,
    "backbone.weights=x cannot be read (x): give another file or the right to read it": (
        "root may read every file: tests/training/test_weights.py"
    ),
    "cannot read checkpoint x: x": OWN_FILES,
    "x: remove it": OWN_FILES,
    "checkpoint x belongs to another trial or configuration": OWN_FILES,
    "x is not a drtune-ray checkpoint": OWN_FILES,
    "checkpoint x is torn (its checksum differs)": OWN_FILES,
    "wrong value of x": "of a damaged record, exit code 3: tests/study/test_damaged_files.py",
    "# SHA-256 of the lines above: ": WINNER,
    "the checksum is another": WINNER,
    "it is another kind of checkpoint": WINNER,
    "MLflow did not promote the model": "exit code 3",
    "x is not set, and without it everyone who reaches the port may ask: set it to a secret of "
    "your choice": "on a cluster: tests/execution/test_serving.py",
    "they are of another trial or configuration": WINNER,
    "their x is x, and x is recorded": WINNER,
    "x does not hold the weights of its trial's best epoch: x; bring the right file back from "
    "MLflow (checkpoint/x of the trial's run) or from a backup, and repeat the command": WINNER,
    "checkpoint x holds more than tensors and plain values": OWN_FILES,
    "x is missing, the weights of a final run: bring it back from a backup, or delete x and repeat "
    "the command, which runs that method again": OWN_FILES,
}
# Functions that refuse with sentences of others.
GATHERING = {
    "manifests/render.py:render_study",
    "manifests/service.py:render_service",
    "jobs/submission.py:study_submission",
    "config/study.py:from_mapping",
    "folders.py:open_folder",
    "data/kinds/rows.py:choose_columns",
    "data/kinds/recognize.py:_check_uri",
    "data/kinds/recognize.py:_refuse_unreadable",
    "data/root.py:check_place",
    "data/sources.py:scan_images",
    "data/splits.py:_cut",
    "data/splits.py:make_splits",
    "data/subsets.py:fold_contents",
    "config/sources.py:mapping_of",
    "space/search_space.py:start_points",
    "study/drops.py:check_searched_drops",
    "study/inputs.py:check_encoders",
    "study/inputs.py:check_inputs",
    "study/training_run.py:_check_name",
    "study/checks.py:_check_final_fit",
    "study/comparison.py:check_comparison",
    "study/comparison_plan.py:_content_checked",
    "study/comparison_plan.py:_study",
    "study/comparison_plan.py:planned",
    "training/weights_file.py:_torch_file",
    "config/section.py:validated",
    "cli/predict.py:predict",
    "results/predict.py:predict",
    "values.py:_loaded",
    "values.py:_num_values",
    "values.py:parse_assignments",
}
# Run as users run them.
IN_A_PROCESS = (
    "bad_studies/everything",
    "bad_trials/type",
    "options-1",
    "images-1preview",
    "studies-1status",
)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, weights_file: Callable[[str], Path]) -> Path:
    """What lies in the folder of every example."""
    folder = tmp_path_factory.mktemp("bad-input") / "here"
    write_coloured(folder / "images", per_class=6)
    shutil.copy(weights_file(BACKBONE), folder / "weights.safetensors")
    return folder


@pytest.fixture
def here(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(pristine, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def prepare(example: Example, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.file is not None:
        shutil.copy(example.file, here)
    for name in example.needs:
        getattr(bad_places, name)(here, monkeypatch)


def content(here: Path) -> dict[str, bytes | None]:
    """All files and folders, but for what a driver leaves."""
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in here.rglob("*")
        if LEFT_BY_A_DRIVER.isdisjoint(path.relative_to(here).parts)
    }


# ---- every example


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(
    example: Example,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(example, here, monkeypatch)
    before = content(here)
    monkeypatch.setattr(sys, "argv", ["drtune-ray", *example.arguments_in(here)])
    # Click names a program that was started as a module, as pytest may be, after the module.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None, raising=False)
    monkeypatch.setattr("ray.init", refuse_to_start)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert example.in_its_words(said.err, here) == example.stderr
    assert end.value.code == 2
    assert content(here) == before


def refuse_to_start(*arguments: object, **options: object) -> None:
    pytest.fail("bad input came as far as Ray")


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_example__in_a_process_of_its_own(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = BY_NAME[name]
    prepare(example, here, monkeypatch)
    before = content(here)
    command = [str(Path(sys.executable).with_name("drtune-ray")), *example.arguments_in(here)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert example.in_its_words(done.stderr, here) == example.stderr
    assert done.returncode == 2
    assert content(here) == before


# ---- every rule


def refusing_sources() -> dict[str, str]:
    """Modules that refuse input, but for those of search spaces."""
    of_spaces = set((PACKAGE / "space").glob("*.py")) - {PACKAGE / NOT_OF_SPACES}
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in of_spaces
    }
    return {name: source for name, source in sources.items() if refuses(source)}


def all_sentences() -> list[Rule]:
    return [r for name, source in refusing_sources().items() for r in sentence_rules(source, name)]


def all_rules() -> list[Rule]:
    sentences = [rule for rule in all_sentences() if rule.where not in NOT_OF_INPUT]
    settings = setting_rules(StudyConfig.__pydantic_core_schema__)
    return [*sentences, *settings, *option_rules(cli)]


def texts() -> list[str]:
    return [example.stderr for example in EXAMPLES]


def test_rules__each_has_an_example() -> None:
    lacking = without_example(all_rules(), texts())
    assert [rule for rule in lacking if rule.sample not in WITHOUT_EXAMPLE] == []


def test_rules__no_exemption_is_out_of_date() -> None:
    lacking = {rule.sample for rule in without_example(all_rules(), texts())}
    assert lacking >= WITHOUT_EXAMPLE.keys()
    assert {rule.where for rule in all_sentences()} >= NOT_OF_INPUT


def test_rules__no_other_way_to_complain() -> None:
    found = (wordless(source, name) for name, source in refusing_sources().items())
    assert set().union(*found) == GATHERING
    assert wordless("def check(): raise ConfigError('no')", "new.py") == {"new.py:check"}


def test_rules__no_message_shows_another_rule() -> None:
    # Else a rule could lose its example unseen.
    rules = [rule for rule in all_sentences() if rule.where not in NOT_OF_INPUT]
    shared = [
        (rule.where, rule.sample, other.sample)
        for rule in rules
        for other in rules
        if rule is not other and other.is_met_by(rule.sample)
    ]
    assert shared == []


def test_rules__the_walk_sees_them() -> None:
    assert {"config/trial.py", "config/sources.py", "data/sources.py"} <= refusing_sources().keys()
    planted = '''
@click.option("--path", help="Where it lies.")
def check(path: str) -> None:
    """A docstring of some words."""
    logger.warning("some other words")
    if not path:
        raise ConfigError(f"{path} is brand new" + " and not known")
    raise EnvironmentProblem("another exit code")
'''
    found = without_example(sentence_rules(planted, "new.py"), texts())
    assert [rule.where for rule in found] == ["new.py:check"] * 2
    assert found[0].is_met_by("drtune-ray: a.yaml is brand new and not known")
    assert not found[0].is_met_by("drtune-ray: a.yaml is old")
    assert refuses(planted) and not refuses("raise EnvironmentProblem('no')")


def test_rules__of_a_new_setting() -> None:
    class Changed(Section):
        number: Annotated[float, Field(ge=0.5)] = 1.0
        word: Literal["a", "b"]

    (schema,) = [Changed.__pydantic_core_schema__]
    found = without_example(list(setting_rules(schema)), ["drtune-ray: unknown key 'numbr'\n"])
    assert [(rule.where, rule.pattern.split(" is not valid: ")[1]) for rule in found] == [
        ("number", ".*?input should be a valid number)"),
        ("number", ".*?input should be a finite number)"),
        ("number", ".*?input should be greater than or equal to 0.5)"),
        ("word", ".*?input should be ')"),
    ]
