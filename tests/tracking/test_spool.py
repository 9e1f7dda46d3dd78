from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from drtune_ray.errors import EnvironmentProblem
from drtune_ray.tracking import events, spool
from drtune_ray.tracking.events import (
    Event,
    FilesReady,
    Metrics,
    MetricsRecorded,
    ModelReady,
    RunFinished,
    RunStarted,
    StepsRecorded,
    WithFiles,
    from_plain,
    to_plain,
)
from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import BackgroundWriter
from tests.small_disks import small_files
from tests.tracking.sending import send_unsent

EVERY_KIND: list[Event] = [
    RunStarted(None, "flowers", {"trials": 20, "space.log": True}, {"tag": "value"}, 1),
    RunStarted(3, "trial 3", {}, {}, 2),
    MetricsRecorded(3, 1, {"val_accuracy": 0.5, "loss": math.inf}, 3),
    StepsRecorded(3, 1, [{"loss": 2.0}, {"loss": 1.0}], 4),
    RunFinished(3, "COMPLETE", "completed", {"best_val_accuracy": 0.5}, {"tag": "value"}, 5),
    FilesReady(3, "/elsewhere/best.ckpt", "checkpoint"),
    ModelReady(None, "/elsewhere/winner", "flowers", {"tag": "value"}),
]


def started(number: int) -> RunStarted:
    return RunStarted(number, f"trial {number}", {}, {}, 1000 + number)


def metric(step: int) -> MetricsRecorded:
    return MetricsRecorded(0, step, {"loss": float(step)}, 1000 + step)


class Shelf:
    """A recorder that keeps what it takes, after `num_failures` refusals."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures, self.num_calls = num_failures, 0
        self.taken: list[Event] = []

    def record(self, event: Event) -> None:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise ConnectionError("no answer")
        self.taken.append(event)

    def record_metrics(self, events: Sequence[Metrics]) -> None:
        for event in events:
            self.record(event)

    def lacks_study(self) -> bool:
        return False


class Wall:
    """A recorder whose server accepts the connection and never answers."""

    def __init__(self) -> None:
        self.is_reached, self.release = threading.Event(), threading.Event()

    def record(self, event: Event) -> None:
        self.is_reached.set()
        self.release.wait(30)

    def record_metrics(self, events: Sequence[Metrics]) -> None:
        for event in events:
            self.record(event)

    def lacks_study(self) -> bool:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drtune_ray.tracking.writer.RETRY_SECONDS", (0.01, 0.02))


# ---- events


@pytest.mark.parametrize("event", EVERY_KIND, ids=lambda event: event.kind)
def test_event__through_json_and_back(event: Event) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(event)))) == event


def test_events__every_kind_is_tested_and_can_be_read() -> None:
    assert {event.kind for event in EVERY_KIND} == set(events._KINDS)


def test_event__default_time_is_now() -> None:
    before = time.time() * 1000 - 1
    assert before <= MetricsRecorded(None, 0, {}).time_ms <= time.time() * 1000


# ---- Spool


def test_spool__oldest_first_until_marked(tmp_path: Path) -> None:
    mine = Spool(tmp_path / "deep" / "spool")
    assert mine.events.next_unsent() is None
    assert mine.num_unsent() == 0
    for event in EVERY_KIND:
        mine.append(event)
    assert mine.num_unsent() == len(EVERY_KIND)
    queues = [mine.files if isinstance(e, WithFiles) else mine.events for e in EVERY_KIND]
    for index, (queue, event) in enumerate(zip(queues, EVERY_KIND, strict=True)):
        assert mine.num_unsent() == len(EVERY_KIND) - index
        assert queue.next_unsent() == queue.next_unsent()  # looking is not sending
        unsent = queue.next_unsent()
        assert unsent is not None
        assert unsent[0] == event
        queue.mark_sent(unsent[1])
    assert mine.events.next_unsent() is None
    assert mine.num_unsent() == 0


# ---- damaged files


@pytest.mark.parametrize("mark", ["", "-4", "5", "1000000", "many", "\udce4", "0x10", "4 4"])
def test_spool__a_mark_that_is_no_position_counts_as_none(tmp_path: Path, mark: str) -> None:
    mine = Spool(tmp_path)
    for step in range(3):
        mine.append(metric(step))
    (tmp_path / spool.SENT_NAME).write_text(mark, errors="surrogateescape")
    assert mine.num_unsent() == 3
    shelf = Shelf()
    assert send_unsent(mine, shelf) == 3
    assert mine.num_unsent() == 0


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        "{}",
        '{"kind": "party"}',
        '{"kind": "run_started"}',
        '"\udce4"',
        "[" * 9999,
    ],
)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_spool__a_damaged_line_is_left_out_and_named(
    tmp_path: Path, line: str, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Spool(tmp_path)
    for step in range(3):
        mine.append(metric(step))
    path = tmp_path / spool.EVENTS_NAME
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:at], line, *lines[at:], ""]), errors="surrogateescape")
    assert mine.damaged() == [f"{path}:{at + 1}"]
    assert mine.num_unsent() == 3
    shelf = Shelf()
    writer = BackgroundWriter(mine, shelf)
    assert writer.close() == 0
    assert shelf.taken == [metric(step) for step in range(3)]
    assert f"tracking: damaged, and therefore not sent: {path}:{at + 1}" in caplog.text


@pytest.mark.parametrize("name", [spool.EVENTS_NAME, spool.FILES_NAME])
def test_spool__an_append_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    event = FilesReady(0, "/x", "winner") if name == spool.FILES_NAME else metric(1)
    mine = Spool(tmp_path)
    mine.append(event)
    before = (tmp_path / name).read_bytes()
    with small_files(len(before) + 20), pytest.raises(OSError, match="File too large"):
        mine.append(event)
    assert (tmp_path / name).read_bytes() == before
    mine.append(event)
    assert mine.num_unsent() == 2


def test_metrics_that_wait_are_sent_together_up_to_the_next_other_event(tmp_path: Path) -> None:
    class Counting(Shelf):
        def record_metrics(self, events: Sequence[Metrics]) -> None:
            sizes.append(len(events))
            super().record_metrics(events)

    sizes: list[int] = []
    shelf, mine = Counting(num_failures=3), Spool(tmp_path)
    waiting = [metric(step) for step in range(70)]
    waiting[5:5] = [RunStarted(3, "trial 3", {}, {}, 2)]
    waiting += [StepsRecorded(3, 1, [{"loss": 1.0}] * 40_000, 4), metric(99)]
    for event in waiting:
        mine.append(event)
    with pytest.raises(ConnectionError):
        send_unsent(mine, shelf)
    assert mine.num_unsent() == len(waiting)  # none of those that went together counts as sent
    shelf.num_failures = 0
    shelf.taken = []
    assert send_unsent(mine, shelf) == len(waiting)
    assert shelf.taken == waiting
    assert sizes == [5, 5, 50, 15, 1, 1]


# ---- files have their own queue


class Refusing(Shelf):
    """A server whose artifact store takes no files."""

    refuses = True

    def record(self, event: Event) -> None:
        if isinstance(event, FilesReady) and self.refuses:
            self.num_calls += 1
            raise PermissionError("the bucket is read-only")
        super().record(event)


def test_files_that_are_refused_hold_back_no_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, mine = Refusing(), Spool(tmp_path)
    writer = BackgroundWriter(mine, shelf)
    writer.emit(RunStarted(0, "trial 0", {}, {}, 1))
    writer.emit(FilesReady(0, "/x", "winner"))
    wait_until(lambda: shelf.num_calls >= 2)
    for step in range(3):
        writer.emit(metric(step))
        wait_until(lambda: metric(step) in shelf.taken)  # noqa: B023
    assert writer.close(timeout_seconds=0.5) == 1
    assert (mine.events.num_unsent(), mine.files.num_unsent()) == (0, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "tracking: the bucket is read-only; metrics are recorded; files are kept on disk and sent "
        "once the server can be reached"
    ]
    shelf.refuses = False
    assert send_unsent(mine, shelf) == 1
    assert shelf.taken[-1] == FilesReady(0, "/x", "winner")


def test_spool__of_an_earlier_version_has_files_among_its_events(tmp_path: Path) -> None:
    lines = [to_plain(e) for e in (metric(1), FilesReady(0, "/x", "winner"), metric(2))]
    (tmp_path / spool.EVENTS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine, shelf = Spool(tmp_path), Refusing()
    with pytest.raises(PermissionError):
        send_unsent(mine, shelf)
    assert shelf.taken == [metric(1), metric(2)]
    shelf.refuses = False
    assert send_unsent(mine, shelf) == 1


def test_spool__files_of_a_study_that_was_moved(tmp_path: Path) -> None:
    study = tmp_path / "here" / "flowers"
    Spool(study / "spool").append(
        FilesReady(0, str(study / "trials/00000/best.ckpt"), "checkpoint")
    )
    (tmp_path / "here").rename(tmp_path / "there")
    unsent = Spool(tmp_path / "there" / "flowers" / "spool").files.next_unsent()
    assert unsent is not None
    moved = tmp_path / "there" / "flowers" / "trials" / "00000" / "best.ckpt"
    assert unsent[0] == FilesReady(0, str(moved), "checkpoint")


# ---- a recorder that lost the study, or refuses it


def test_send_unsent__everything_again_to_a_recorder_that_lacks_the_study(tmp_path: Path) -> None:
    mine, shelf = Spool(tmp_path), Shelf()
    for event in EVERY_KIND:
        mine.append(event)
    send_unsent(mine, shelf)
    empty = Shelf()
    empty.lacks_study = lambda: True  # type: ignore[method-assign]
    assert send_unsent(mine, empty) == len(EVERY_KIND)
    assert empty.taken == EVERY_KIND


def test_background_writer__a_refusal_is_told_once_and_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Deleted(Shelf):
        def record(self, event: Event) -> None:
            self.num_calls += 1
            raise EnvironmentProblem("the experiment was deleted: restore it")

    shelf = Deleted()
    started = time.monotonic()
    writer = BackgroundWriter(Spool(tmp_path), shelf)
    for step in range(5):
        writer.emit(metric(step))
    assert writer.close() == 5
    assert time.monotonic() - started < 5
    assert shelf.num_calls <= 2
    assert [record.getMessage() for record in caplog.records] == [
        "tracking: the experiment was deleted: restore it; events are kept on disk and sent by "
        "`drtune-ray sync`"
    ]


def test_spool__another_process_goes_on_from_the_mark(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    for step in range(4):
        first.append(metric(step))
    unsent = first.events.next_unsent()
    assert unsent is not None
    first.events.mark_sent(unsent[1])
    second = Spool(tmp_path)
    second.append(metric(4))
    shelf = Shelf()
    assert send_unsent(second, shelf) == 4
    assert shelf.taken == [metric(step) for step in (1, 2, 3, 4)]
    assert (first.num_unsent(), second.num_unsent()) == (0, 0)


@pytest.mark.parametrize("torn", ['{"kind": "metrics_rec', "{", '{"kind": "run_started"}'])
def test_spool__torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    Spool(tmp_path).append(metric(1))
    with (tmp_path / spool.EVENTS_NAME).open("a") as file:
        file.write(torn)
    mine = Spool(tmp_path)
    assert mine.num_unsent() == 1
    mine.append(metric(2))
    shelf = Shelf()
    assert send_unsent(mine, shelf) == 2
    assert shelf.taken == [metric(1), metric(2)]


def test_spool__only_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / spool.EVENTS_NAME).write_text('{"kind"')
    mine = Spool(tmp_path)
    assert mine.events.next_unsent() is None
    mine.append(metric(1))
    (line,) = (tmp_path / spool.EVENTS_NAME).read_text().splitlines()
    values = json.loads(line)
    assert len(values.pop("id")) == 32  # an id of its own
    assert values == to_plain(metric(1))


def test_spool__a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    mine = Spool(tmp_path)
    with (tmp_path / spool.EVENTS_NAME).open("w") as file:
        file.write(json.dumps(to_plain(metric(1))))
    assert mine.events.next_unsent() is None


def test_spool__line_torn_by_a_full_disk_loses_that_event_only(tmp_path: Path) -> None:
    # BUG found: the next event is written behind the torn one on the same line, JSON cannot read
    # it, and nothing is ever sent again.
    mine = Spool(tmp_path)
    mine.append(metric(1))
    with (tmp_path / spool.EVENTS_NAME).open("a") as file:
        file.write('{"kind": "metrics_rec')  # then ENOSPC: append() raised OSError
    mine.append(metric(2))
    mine.append(metric(3))
    shelf = Shelf()
    send_unsent(mine, shelf)
    assert shelf.taken == [metric(1), metric(2), metric(3)]


def test_spool__empty_mark_after_a_power_cut(tmp_path: Path) -> None:
    # BUG found: mark_sent renames a file that was never fsynced; found empty, int("") raises in
    # num_unsent(), hence in close(), hence at the end of the study. From the start is always safe.
    mine = Spool(tmp_path)
    mine.append(metric(1))
    (tmp_path / spool.SENT_NAME).write_text("")
    assert mine.num_unsent() == 1


def test_spool__many_threads_write_whole_lines(tmp_path: Path) -> None:
    mine = Spool(tmp_path)

    def write(first: int) -> None:
        for step in range(first, first + 10):
            mine.append(metric(step))

    threads = [threading.Thread(target=write, args=(10 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shelf = Shelf()
    assert send_unsent(mine, shelf) == 40
    assert sorted(event.step for event in shelf.taken) == list(range(40))  # type: ignore[union-attr]


def test_send_unsent__stops_at_the_event_that_fails(tmp_path: Path) -> None:
    mine = Spool(tmp_path)
    for step in range(3):
        mine.append(started(step))
    shelf = Shelf()
    shelf.taken.append(started(-1))

    def record(event: Event) -> None:
        if event == started(1):
            raise ConnectionError("no answer")
        shelf.taken.append(event)

    shelf.record = record  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="^no answer$"):
        send_unsent(mine, shelf)
    assert shelf.taken == [started(-1), started(0)]
    assert mine.num_unsent() == 2


# ---- BackgroundWriter


def test_background_writer__sends_everything_in_order(tmp_path: Path) -> None:
    shelf = Shelf()
    writer = BackgroundWriter(Spool(tmp_path), shelf)
    for event in EVERY_KIND:
        writer.emit(event)
    assert writer.close() == 0
    assert shelf.taken == EVERY_KIND
    assert writer.close() == 0  # a second time is harmless


def test_background_writer__an_epoch_that_is_trained_again_is_recorded_once(
    tmp_path: Path,
) -> None:
    """MLflow had two points of one epoch, with two times, after a driver was killed."""
    steps = StepsRecorded(0, 1, [{"loss": 2.0}], 1001)
    for later in (0, 60_000):  # of another driver, with the time of its own training
        shelf = Shelf()
        writer = BackgroundWriter(Spool(tmp_path), shelf)
        for event in (started(0), metric(1), metric(1), metric(2), steps):
            writer.emit(replace(event, time_ms=event.time_ms + later))
        writer.close()
        others = [] if later else [metric(1), metric(2), steps]
        assert shelf.taken == [replace(started(0), time_ms=1000 + later), *others]


def test_background_writer__sends_while_the_study_runs(tmp_path: Path) -> None:
    shelf = Shelf()
    writer = BackgroundWriter(Spool(tmp_path), shelf)
    for step in range(3):
        writer.emit(metric(step))
        wait_until(lambda: len(shelf.taken) == step + 1)  # noqa: B023
    assert writer.close() == 0


def test_background_writer__close_waits_while_events_are_taken(tmp_path: Path) -> None:
    class Slow(Shelf):
        def record(self, event: Event) -> None:
            time.sleep(0.1)
            super().record(event)

    shelf = Slow()
    writer = BackgroundWriter(Spool(tmp_path), shelf)
    for step in range(40):
        writer.emit(started(step))
    assert writer.close(timeout_seconds=3.0) == 0  # all of them take 4 s
    assert len(shelf.taken) == 40


def test_background_writer__interrupted_it_does_not_wait_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BackgroundWriter.close, "__defaults__", (0.5, 60.0))

    class Slow(Shelf):
        def record(self, event: Event) -> None:
            time.sleep(0.1)
            super().record(event)

    spool_of_it = Spool(tmp_path)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(spool_of_it, Slow()) as writer:
        for step in range(40):
            writer.emit(metric(step))
        raise KeyboardInterrupt
    assert spool_of_it.num_unsent() > 20  # all of them would take 4 s


@pytest.mark.usefixtures("short_retries")
def test_background_writer__server_that_comes_back(tmp_path: Path) -> None:
    shelf = Shelf(num_failures=2)
    writer = BackgroundWriter(Spool(tmp_path), shelf)
    for step in range(5):
        writer.emit(metric(step))
    wait_until(lambda: len(shelf.taken) == 5)
    assert writer.close() == 0
    assert shelf.taken == [metric(step) for step in range(5)]  # none lost, none twice
    assert shelf.num_calls == 7


def test_background_writer__close_uses_its_time(tmp_path: Path) -> None:
    # BUG found: close() ends the wait for the next try and with it the thread, so a server that
    # is back (here at once, there within up to RETRY_SECONDS[-1] = 60 s) gets nothing, although
    # close promises to "send what is left within the time".
    shelf = Shelf(num_failures=1)
    writer = BackgroundWriter(Spool(tmp_path), shelf)
    for step in range(3):
        writer.emit(metric(step))
    wait_until(lambda: shelf.num_calls >= 1)
    assert writer.close(timeout_seconds=10) == 0
    assert shelf.taken == [metric(step) for step in range(3)]


def test_background_writer__server_that_never_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, short_retries: None
) -> None:
    shelf = Shelf(num_failures=10**9)
    with caplog.at_level(logging.WARNING):
        writer = BackgroundWriter(Spool(tmp_path), shelf)
        for step in range(5):
            writer.emit(metric(step))
        wait_until(lambda: shelf.num_calls > 3)
        started = time.monotonic()
        assert writer.close(timeout_seconds=1.0) == 5
    assert time.monotonic() - started < 3.0
    assert shelf.taken == []
    assert [record.getMessage() for record in caplog.records] == [
        "tracking: no answer; events are kept on disk and sent once the server can be reached"
    ]


def test_background_writer__server_that_hangs(tmp_path: Path) -> None:
    wall = Wall()
    writer = BackgroundWriter(Spool(tmp_path), wall)
    writer.emit(metric(1))
    assert wall.is_reached.wait(10)
    started = time.monotonic()
    writer.emit(metric(2))  # the study does not wait for the server
    assert time.monotonic() - started < 1.0
    assert writer.close(timeout_seconds=0.2) == 2
    assert time.monotonic() - started < 3.0
    wall.release.set()


def test_background_writer__event_is_on_disk_when_emit_returns(tmp_path: Path) -> None:
    wall = Wall()
    writer = BackgroundWriter(Spool(tmp_path), wall)
    for step in range(3):
        writer.emit(metric(step))
        lines = (tmp_path / spool.EVENTS_NAME).read_text().splitlines()
        assert from_plain(json.loads(lines[-1])) == metric(step)
        assert len(lines) == step + 1
    wall.release.set()
    assert writer.close() == 0


def test_background_writer__next_run_sends_what_is_left(tmp_path: Path) -> None:
    dead = BackgroundWriter(Spool(tmp_path), Shelf(num_failures=10**9))
    dead.emit(metric(1))
    dead.emit(metric(2))
    assert dead.close(timeout_seconds=1.0) == 2
    shelf = Shelf()
    writer = BackgroundWriter(Spool(tmp_path), shelf)  # nothing need be emitted
    wait_until(lambda: len(shelf.taken) == 2)
    writer.emit(metric(3))
    assert writer.close() == 0
    assert shelf.taken == [metric(1), metric(2), metric(3)]


def test_background_writer__full_disk_does_not_stop_the_study(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Spool(tmp_path)
    writer = BackgroundWriter(mine, Shelf())

    def append(event: Event) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mine, "append", append)
    with caplog.at_level(logging.WARNING):
        writer.emit(metric(1))
    assert writer.close() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "tracking: an event could not be written to disk: [Errno 28] No space left on device"
    ]
