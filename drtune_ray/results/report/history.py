"""What the trials of a study did: their curves, ends, times and costs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from optuna.trial import FrozenTrial

from drtune_ray.config.metric import Metric
from drtune_ray.results.trials import HOST, TrialSummary, is_trained, values_by_epoch
from drtune_ray.tracking.events import Event, MetricsRecorded, RunFinished, RunStarted
from drtune_ray.tracking.machine_watch import CPU_ENERGY, GPU_ENERGY
from drtune_ray.training.reports import OBJECTIVE, OF_SETTINGS

# How a trial ended, as the report groups them.
COMPLETED, STOPPED, IMPOSSIBLE, FAILED, UNFINISHED = (
    "completed",
    "stopped early",
    "not trainable",
    "failed by the machine",
    "unfinished",
)
KINDS = (COMPLETED, STOPPED, IMPOSSIBLE, FAILED, UNFINISHED)
OF_STATES = {"COMPLETE": COMPLETED, "FAIL": FAILED}
UNKNOWN_HOST = "unknown host"


def kind_of(trial: TrialSummary) -> str:
    """Return how a trial ended; one that diverged or ran out of memory was not trainable."""
    if trial.state == "PRUNED":
        return IMPOSSIBLE if trial.outcome in OF_SETTINGS else STOPPED
    return OF_STATES.get(trial.state, UNFINISHED)


@dataclass(frozen=True)
class Span:
    """A time during which a trial ran; a resumed trial has several.

    Attributes:
        number: Number of the trial.
        start_ms: Its start, in milliseconds since 1970.
        end_ms: Its end.
        host: Machine of the trial's last result.
        lane: Row among the trials of this machine that ran at the same time, from 0.
    """

    number: int
    start_ms: int
    end_ms: int
    host: str
    lane: int = 0


@dataclass(frozen=True)
class Cost:
    """What a study has cost.

    Attributes:
        wall_seconds: Time from the start of the first trial to the end of the last one.
        trial_seconds: Sum of the times of all trials.
        stopped_seconds: Part of it that went into trials without a result.
        num_epochs: Number of trained epochs.
        epoch_seconds: Median time of an epoch; None if unknown.
        best_after_seconds: Time until the best value of the search was reached; None if unknown.
        energy_joules: Energy of the CPUs and GPUs of the machine that ran the command, by all of
            its programs; None where it cannot be read.
    """

    wall_seconds: float
    trial_seconds: float
    stopped_seconds: float
    num_epochs: int
    epoch_seconds: float | None
    best_after_seconds: float | None
    energy_joules: float | None = None


@dataclass(frozen=True)
class History:
    """What the trials did.

    Attributes:
        metrics: Metrics of each epoch from 1, by the number of the trial.
        spans: Times during which trials ran, by start.
        cost: Cost of all of it; None before the first trial.
    """

    metrics: Mapping[int, Mapping[int, Mapping[str, float]]]
    spans: tuple[Span, ...]
    cost: Cost | None

    def curve(self, number: int, metric: str) -> tuple[list[int], list[float]]:
        """Return epochs and values of a metric of a trial."""
        epochs = self.metrics.get(number, {})
        known = [(epoch, row[metric]) for epoch, row in sorted(epochs.items()) if metric in row]
        return [epoch for epoch, _ in known], [value for _, value in known]

    def has(self, metric: str) -> bool:
        """Return whether any epoch has the metric."""
        return any(metric in row for epochs in self.metrics.values() for row in epochs.values())


def ends(trials: Iterable[TrialSummary]) -> list[tuple[str, str, int]]:
    """Return kind, outcome and number of the trials that ended in each way."""
    found = Counter((kind_of(trial), trial.outcome or kind_of(trial)) for trial in trials)
    ordered = sorted(found.items(), key=lambda item: (KINDS.index(item[0][0]), -item[1], item[0]))
    return [(kind, outcome, number) for (kind, outcome), number in ordered]


def read_history(
    frozen: Sequence[FrozenTrial],
    trials: Sequence[TrialSummary],
    events: Iterable[Event],
) -> History:
    """Return what the trials did.

    Args:
        frozen: Trials of the Optuna study, which know the best value of every epoch.
        trials: Their summaries.
        events: Events of the spool, oldest first; they know the rest and may lack a part.
    """
    known = [trial for trial in frozen if is_trained(trial)]
    metrics = {trial.number: trial.metric for trial in trials}
    watch = _Watch({trial.number: trial for trial in known}, metrics)
    for event in events:
        watch.take(event)
    spans = _in_lanes(watch.spans())
    return History(watch.metrics, spans, _cost(trials, watch, spans))


@dataclass
class _Watch:
    """Follows the events of a study's trials."""

    known: Mapping[int, FrozenTrial]
    choosing: Mapping[int, Metric]
    metrics: dict[int, dict[int, dict[str, float]]] = field(default_factory=dict)
    times: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # of best scores
    energies: list[float] = field(default_factory=list)
    _open: dict[int, tuple[int, int]] = field(default_factory=dict)
    _closed: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, trial in self.known.items():
            values = values_by_epoch(trial)
            # Optuna knows the best so far alone.
            self.metrics[number] = {epoch: {OBJECTIVE: value} for epoch, value in values.items()}

    def take(self, event: Event) -> None:
        """Add an event that follows the ones before."""
        number = event.number
        if number is None and isinstance(event, MetricsRecorded):
            self.energies += [
                event.metrics[name] for name in (CPU_ENERGY, GPU_ENERGY) if name in event.metrics
            ]
        if not isinstance(number, int) or number not in self.known:
            return
        if isinstance(event, RunStarted):
            self._close(number)
            self._open[number] = (event.time_ms, event.time_ms)
        elif isinstance(event, MetricsRecorded):
            self.metrics[number].setdefault(event.step, {}).update(event.metrics)
            metric = self.choosing[number]
            if (best := event.metrics.get(metric.best)) is not None:
                self.times.setdefault(number, []).append((event.time_ms, metric.score(best)))
            if number in self._open:
                self._open[number] = (self._open[number][0], event.time_ms)
        elif isinstance(event, RunFinished) and number in self._open:
            self._open[number] = (self._open[number][0], event.time_ms)
            self._close(number)

    def _close(self, number: int) -> None:
        if number in self._open:
            self._closed.append((number, *self._open.pop(number)))

    def spans(self) -> list[Span]:
        """Return the times during which trials ran, by start."""
        still = [(number, *times) for number, times in self._open.items()]
        found = [self._span(*each) for each in (*self._closed, *still)]
        seen = {span.number for span in found}
        for number, trial in self.known.items():
            if number not in seen and trial.datetime_start:  # its events were lost
                times = trial.datetime_start, trial.datetime_complete or trial.datetime_start
                found.append(self._span(number, *(int(t.timestamp() * 1000) for t in times)))
        return sorted(found, key=lambda span: (span.start_ms, span.number))

    def _span(self, number: int, start_ms: int, end_ms: int) -> Span:
        host = str(self.known[number].user_attrs.get(HOST, UNKNOWN_HOST))
        return Span(number, start_ms, max(start_ms, end_ms), host)


def _in_lanes(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Put spans of a machine that overlap into different lanes, each as low as possible."""
    free: dict[str, list[int]] = {}
    placed = []
    for span in spans:
        lanes = free.setdefault(span.host, [])
        lane = next((i for i, end in enumerate(lanes) if end <= span.start_ms), len(lanes))
        lanes[lane : lane + 1] = [span.end_ms]
        placed.append(Span(span.number, span.start_ms, span.end_ms, span.host, lane))
    return tuple(placed)


def _cost(trials: Sequence[TrialSummary], watch: _Watch, spans: Sequence[Span]) -> Cost | None:
    if not spans:
        return None
    start = min(span.start_ms for span in spans)
    seconds = {trial.number: 0.0 for trial in trials}
    for span in spans:
        seconds[span.number] = seconds.get(span.number, 0.0) + _seconds(span)
    per_epoch = [
        row["seconds"]
        for epochs in watch.metrics.values()
        for row in epochs.values()
        if "seconds" in row
    ]
    without = (trial.number for trial in trials if kind_of(trial) in (STOPPED, IMPOSSIBLE, FAILED))
    searched = {trial.number for trial in trials if not trial.is_final}
    reached = [
        (score, -time_ms) for number in searched for time_ms, score in watch.times.get(number, [])
    ]
    return Cost(
        wall_seconds=(max(span.end_ms for span in spans) - start) / 1000,
        trial_seconds=sum(seconds.values()),
        stopped_seconds=sum(seconds[number] for number in without),
        num_epochs=sum(map(len, watch.metrics.values())),
        epoch_seconds=statistics.median(per_epoch) if per_epoch else None,
        best_after_seconds=(-max(reached)[1] - start) / 1000 if reached else None,
        energy_joules=sum(watch.energies) if watch.energies else None,
    )


def _seconds(span: Span) -> float:
    return (span.end_ms - span.start_ms) / 1000
