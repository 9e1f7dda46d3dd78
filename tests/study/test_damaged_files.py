"""Each file that a study reads: cut off, emptied, a bit flipped, replaced by a folder.

Whatever is damaged, a command does its work or ends with one message, never with a traceback.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from drtune_ray.display.status import status_lines
from drtune_ray.errors import ConfigError, DrtuneError, EnvironmentProblem
from drtune_ray.results.evaluate import OPENINGS_NAME
from drtune_ray.results.evaluation_record import RESULT_NAME
from drtune_ray.study import driver, evaluation
from drtune_ray.study import run as run_module
from drtune_ray.study.evaluation import evaluate_study
from drtune_ray.study.inputs import manifest_path
from drtune_ray.study.run import run_study
from drtune_ray.study.status import DONE, facts, read_status
from drtune_ray.study.sync import page_of, sync_study
from drtune_ray.tracking.spool import Spool
from tests import past_studies
from tests.past_studies import NAME, config_in

NUM_FLIPS, NUM_FLIPS_OF_LONG_COMMANDS = 12, 2
FLIPPED = "one bit flipped"
SHARED_SPLITS = "the splits of the images"  # whose name has a hash of their path
# Below the storage: the study's own files, then those that studies share.
FILES = [
    f"{NAME}/study.yaml",
    f"{NAME}/done",
    f"{NAME}/command.json",
    f"{NAME}/driver.txt",
    f"{NAME}/driver.lock",
    f"{NAME}/optuna.journal",
    f"{NAME}/spool/events.jsonl",
    f"{NAME}/spool/sent",
    f"{NAME}/spool/files.jsonl",
    f"{NAME}/spool/files-sent",
    f"{NAME}/splits.parquet",
    f"{NAME}/winner/model.yaml",
    f"{NAME}/winner/model.safetensors",
    OPENINGS_NAME,
    SHARED_SPLITS,
]
OF_EVALUATE = {"study.yaml", "splits.parquet", "model.yaml", "model.safetensors", OPENINGS_NAME}
OF_TUNE = {"study.yaml", "done", "driver.txt", "driver.lock", "optuna.journal", "model.yaml"}
OF_TUNE |= {SHARED_SPLITS, "events.jsonl", "sent", "files.jsonl", "files-sent"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study that was evaluated once, and a database of MLflow that has it."""
    here = tmp_path_factory.mktemp("damaged") / "here"
    folder = past_studies.install(here)
    storage = str(here / "storage")
    Spool(folder / "spool").rewind()
    sync_study(NAME, storage)
    evaluate_study(NAME, storage)
    (folder / "driver.lock").touch()
    (folder / "driver.txt").write_text("process 7 on elsewhere")
    (folder / "command.json").write_text('{"arguments": ["tune", "study.yaml"], "folder": "/"}')
    return here


@pytest.fixture
def here(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own; MLflow keeps its databases open by their paths."""
    copied = tmp_path / "here"
    shutil.copytree(pristine, copied)
    past_studies.replace_text(copied / "storage" / NAME, bytes(pristine), bytes(copied))
    # No Ray: what it does is tested elsewhere.
    monkeypatch.setattr(run_module, "_cluster", lambda config: nullcontext())
    return copied


def damages(content: bytes) -> Iterator[tuple[str, Callable[[Path], object]]]:
    yield "cut off", lambda path: path.write_bytes(content[: len(content) // 2])
    yield "without its end", lambda path: path.write_bytes(content[:-1])
    yield "empty", lambda path: path.write_bytes(b"")
    yield "zeros", lambda path: path.write_bytes(bytes(len(content)))
    yield "missing", lambda path: None
    yield "a folder", lambda path: path.mkdir()
    for seed in range(NUM_FLIPS if content else 0):
        bit = random.Random(seed).randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"{FLIPPED}, bit {bit}", lambda path, flipped=flipped: path.write_bytes(flipped)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def show_status(here: Path) -> None:
    found = read_status(str(here / "storage" / NAME), "")
    assert status_lines(found, "drtune-ray")
    json.dumps(facts(found), default=str)


def evaluate(here: Path) -> None:
    evaluate_study(NAME, str(here / "storage"), again=True)


def tune(here: Path) -> None:
    run_study(config_in(here))


def sync(here: Path) -> None:
    sync_study(NAME, str(here / "storage"))


def ui(here: Path) -> None:
    page_of(NAME, str(here / "storage"))


def check(here: Path, name: str, commands: list[Callable[[Path], None]]) -> list[str]:
    """Damage a file in each way, and return what the commands said; only our errors may end one."""
    path, said = here / "storage" / name, list[str]()
    whole = here / "whole"
    shutil.copytree(here / "storage", whole)
    try:
        num_flips = 0
        for what, damage in damages(path.read_bytes()):
            num_flips += what.startswith(FLIPPED)
            is_quick = num_flips > NUM_FLIPS_OF_LONG_COMMANDS
            for command in commands[:1] if is_quick else commands:
                remove(path)
                damage(path)
                try:
                    command(here)
                except DrtuneError as error:
                    said.append(str(error))
                except BaseException as error:
                    error.add_note(f"{command.__name__} with {name} {what}")
                    raise
                remove(here / "storage")
                shutil.copytree(whole, here / "storage")
    finally:
        shutil.rmtree(whole)
    return said


class Nowhere:
    """A recorder for commands whose events do not matter."""

    def record(self, event: object) -> None:
        pass

    def record_metrics(self, events: object) -> None:
        pass

    def lacks_study(self) -> bool:
        return False


@pytest.mark.parametrize("name", FILES)
def test_no_traceback(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sync_study", lambda *arguments: 0)
    monkeypatch.setattr(driver, "build_recorder", lambda *arguments: Nowhere())
    last = Path(name).name
    if name == SHARED_SPLITS:
        path = manifest_path(config_in(here).trial.data, here / "storage")
        path.parent.mkdir()
        shutil.copy(here / "storage" / NAME / "splits.parquet", path)
        name = path.relative_to(here / "storage").as_posix()
    commands = [show_status]
    commands += [evaluate] if last in OF_EVALUATE else []
    commands += [tune] if last in OF_TUNE else []
    for message in check(here, name, commands):
        assert "Traceback" not in message and message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mlflow.db", f"{NAME}/study.yaml", f"{NAME}/spool/events.jsonl", f"{NAME}/spool/sent"]
)
def test_no_traceback__of_what_sends_events(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.NUM_FLIPS", 2)
    for message in check(here, name, [sync] if "spool" in name else [sync, ui]):
        assert "Traceback" not in message and message


# ---- what is said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{}", "was not written by drtune-ray (it lacks"),
        ("a: [", "is damaged ("),
        ("a: &a {b: *a}", "what begins here contains itself"),
        ("a: " + "[" * 1000 + "]" * 1000, "more than 50 levels below each other"),
        ("study_id: 3\nkind: study\nconfig: {}\ndeciding: {}\ntracking: {}", "['study_id']"),
        (
            "study_id: a\nkind: study\nconfig: {}\ndeciding: {}\ntracking: {uri: [1]}",
            "tracking.uri",
        ),
    ],
)
def test_a_damaged_record_is_named(here: Path, content: str, reason: str) -> None:
    path = here / "storage" / NAME / "study.yaml"
    path.write_text(content)
    for command in (show_status, sync, ui, evaluate, tune):
        with pytest.raises(DrtuneError) as caught:
            command(here)
        assert str(path) in str(caught.value) and reason in str(caught.value)
        assert caught.value.exit_code == (2 if content == "{}" else 3)


def test_a_damaged_line_of_the_spool__the_rest_is_sent_and_the_line_named(here: Path) -> None:
    folder = here / "storage" / NAME
    path = folder / "spool" / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "no event\n", *lines[2:]]))
    num_files = len((folder / "spool" / "files.jsonl").read_text().splitlines())
    Spool(folder / "spool").rewind()
    assert f"{path}:3 is damaged and is not sent" in str(read_status(str(folder), "").notes)
    with pytest.raises(EnvironmentProblem) as caught:
        sync_study(NAME, str(here / "storage"))
    assert str(caught.value) == (
        f"{len(lines) + num_files} events sent; damaged, and therefore not sent: {path}:3; remove "
        "these lines, or bring the file back from a backup"
    )
    assert Spool(folder / "spool").num_unsent() == 0


def test_a_damaged_opening__is_named_and_may_be_overruled(here: Path) -> None:
    path = here / "storage" / OPENINGS_NAME
    (here / "storage" / NAME / RESULT_NAME).unlink()  # otherwise it is shown, and nothing opened
    with path.open("a") as file:
        file.write('{"test_split": "12\n')
    with pytest.raises(EnvironmentProblem) as caught:
        evaluate_study(NAME, str(here / "storage"))
    assert str(caught.value) == (
        f"{path}:2 cannot be read, and may be an opening of this test split: correct or remove "
        "the line, or add --again to open the split anyway"
    )
    assert evaluate_study(NAME, str(here / "storage"), again=True).num_openings == 2


def test_an_opening_behind_a_torn_line_is_not_glued_to_it(here: Path) -> None:
    path = here / "storage" / OPENINGS_NAME
    with path.open("a") as file:
        file.write('{"test_split": "12')  # on a full disk
    assert evaluate_study(NAME, str(here / "storage"), again=True).num_openings == 2
    assert path.read_text().count("\n") == 2


# ---- a study that is copied elsewhere keeps its seal


def test_a_copy_of_a_study_brings_the_openings_of_its_split(here: Path) -> None:
    """In another storage the test split was as good as new."""
    storage, elsewhere = here / "storage", here / "elsewhere"
    other = storage / "other"  # of the same images; it was not evaluated itself
    shutil.copytree(storage / NAME, other)
    (other / RESULT_NAME).unlink()
    (other / OPENINGS_NAME).unlink()
    evaluate_study(NAME, str(storage), again=True)
    shutil.copytree(other, elsewhere / "other")
    with pytest.raises(ConfigError) as caught:
        evaluate_study("other", str(elsewhere))
    assert "was opened before (2 times)" in str(caught.value)
    # Beside it, a study that never saw the first storage.
    shutil.copytree(elsewhere / "other", elsewhere / "third")
    (elsewhere / "third" / OPENINGS_NAME).unlink()
    with pytest.raises(ConfigError, match=r"was opened before \(2 times\)"):
        evaluate_study("third", str(elsewhere))
    assert evaluate_study("third", str(elsewhere), again=True).num_openings == 3


def test_a_study_that_is_begun_after_an_opening_knows_of_it(here: Path) -> None:
    (here / "storage" / NAME / OPENINGS_NAME).unlink()
    run_study(config_in(here))
    shutil.copytree(here / "storage" / NAME, here / "elsewhere" / NAME)
    (here / "elsewhere" / NAME / RESULT_NAME).unlink()
    with pytest.raises(ConfigError, match=r"was opened before \(1 time\)"):
        evaluate_study(NAME, str(here / "elsewhere"))


@pytest.mark.parametrize("name", ["driver.lock", "driver.txt", "optuna.journal.lock"])
def test_a_folder_in_the_place_of_a_file_of_the_driver(here: Path, name: str) -> None:
    path = here / "storage" / NAME / name
    remove(path)
    path.mkdir()
    with pytest.raises(EnvironmentProblem) as caught:
        run_study(config_in(here))
    assert str(caught.value) == (
        f"{path} cannot be used (Is a directory): make it accessible, move it away if it is in the "
        "place of another file, or bring it back from a backup"
    )
    assert caught.value.exit_code == 3


def test_a_lost_database__is_named_and_sync_records_the_study_again(here: Path) -> None:
    path = here / "storage" / "mlflow.db"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(EnvironmentProblem) as caught:
        sync_study(NAME, str(here / "storage"))
    assert "is damaged (" in str(caught.value)
    assert "move it away, and `drtune-ray sync` records each study" in str(caught.value)
    path.rename(path.with_name("moved.db"))
    assert sync_study(NAME, str(here / "storage")) > 10
    (parent,) = runs_of(here, "study")
    assert parent.info.status == "FINISHED"
    assert len(runs_of(here, "0") + runs_of(here, "1")) == 2


def runs_of(here: Path, trial: str) -> list:
    import mlflow

    client = mlflow.MlflowClient(page_of(NAME, str(here / "storage"))[0])
    number = client.get_experiment_by_name("drtune-ray").experiment_id
    return client.search_runs([number], f"tags.`drtune.trial` = '{trial}'")


# ---- the end of a study


def test_the_same_command_sends_what_a_driver_killed_at_its_end_did_not(here: Path) -> None:
    """It said done, and the study's run stayed RUNNING for ever."""
    import mlflow

    folder = here / "storage" / NAME
    client = mlflow.MlflowClient(page_of(NAME, str(here / "storage"))[0])
    (parent,) = runs_of(here, "study")
    client.update_run(parent.info.run_id, status="RUNNING")
    events = (folder / "spool" / "events.jsonl").read_bytes()
    last = events.rindex(b'{"kind": "run_finished"')
    assert b'"number": null' in events[last:]
    (folder / "spool" / "sent").write_text(str(last))
    result = run_study(config_in(here))
    assert (result.was_done, result.num_unsent) == (True, 0)
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"


def without_its_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study before its winner was written; its tables are made in this process."""
    from drtune_ray.execution.capacity import Capacity

    capacity = Capacity((), is_local=True)
    monkeypatch.setattr(run_module, "_cluster", lambda config: nullcontext(capacity))
    folder = here / "storage" / NAME
    (folder / "done").unlink()
    shutil.rmtree(folder / "winner")
    return folder


def test_an_event_that_a_full_disk_lost_leaves_the_study_open(here, monkeypatch) -> None:
    folder = without_its_end(here, monkeypatch)
    append = Spool.append

    def full(spool: Spool, event) -> None:
        if event.kind == "run_finished" and event.number is None and event.state == "COMPLETE":
            raise OSError(28, "No space left on device")
        append(spool, event)

    with monkeypatch.context() as patch, pytest.raises(EnvironmentProblem, match="is full"):
        patch.setattr(Spool, "append", full)
        run_study(config_in(here))
    assert not (folder / "done").exists()
    result = run_study(config_in(here))
    assert (result.was_done, result.num_unsent) == (False, 0)
    assert (folder / "done").exists() and (folder / "winner" / "model.yaml").exists()


# ---- studies of earlier versions


@pytest.mark.parametrize(
    "version", sorted(int(p.name.split("-")[1]) for p in past_studies.FIXTURES.glob("numeric-*"))
)
def test_a_study_of_each_released_version_is_shown_evaluated_and_sent(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = past_studies.install(tmp_path / "here", version)
    storage = str(folder.parent)
    found = read_status(NAME, storage)
    assert (found.state, found.num_done, found.notes, found.num_unsent) == (DONE, 2, (), 0)
    assert found.best is not None
    assert "state             done" in "\n".join(status_lines(found, "drtune-ray"))
    Spool(folder / "spool").rewind()
    shown = evaluate_study(NAME, storage)
    assert shown.validation is not None
    assert shown.validation.share == shown.recorded_validation
    assert shown.num_openings == 1
    assert Spool(folder / "spool").num_unsent() == 0
    if version == past_studies.NUMERIC_VERSION:
        monkeypatch.setattr(run_module, "_cluster", lambda config: nullcontext())
        result = run_study(config_in(tmp_path / "here"))
        assert result.was_done
        assert result.winner.best_val_accuracy == found.best.best_val_accuracy


def test_there_is_a_study_of_the_present_version() -> None:
    assert (past_studies.FIXTURES / f"numeric-{past_studies.NUMERIC_VERSION}").is_dir(), (
        "run `python -m tests.past_studies`"
    )
