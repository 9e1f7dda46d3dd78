"""The result of a study in one sentence: what won, by how much, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from drtune_ray.config.metric import DEFAULT_METRIC, METRICS, Metric
from drtune_ray.results.evaluation_record import Accuracy
from drtune_ray.results.trials import TrialSummary
from drtune_ray.results.words import by, figure, noun, percent, title

CE_TUNING = "ce_tuning"
MIN_SEEDS = 2  # that must agree where there is no interval: a single one always does


@dataclass(frozen=True)
class Candidate:
    """A configuration and its measured values of the metric that chooses.

    Attributes:
        trial: Its trial of the search.
        values: Value on each new seed; empty if it has only that of the search.
    """

    trial: TrialSummary
    values: tuple[float, ...] = ()

    @property
    def metric(self) -> Metric:
        """Metric that chooses."""
        return self.trial.metric

    @property
    def value(self) -> float:
        """Mean over the new seeds; without them the value of the search."""
        if self.values:
            return statistics.fmean(self.values)
        return math.nan if self.trial.best_value is None else self.trial.best_value

    @property
    def name(self) -> str:
        """Number of the trial, as people read it."""
        return f"trial {self.trial.number}"

    @property
    def origin(self) -> str:
        """Method, and which reference trial it is."""
        reference = self.trial.reference
        is_named = reference is None or reference == self.trial.config["method"]["name"]
        return self.method if is_named else f"{self.method}, reference trial {reference!r}"

    @property
    def method(self) -> str:
        """Name of the method."""
        name = str(self.trial.config.get("method", {}).get("name", ""))
        return title(name)

    def interval(self, num_images: int) -> tuple[float, float] | None:
        """Return the 95 % Wilson interval of the accuracy on this many validation images.

        None for other metrics, and where the number of images is unknown.
        """
        if not num_images or not has_interval(self.metric):
            return None
        return Accuracy(round(self.value * num_images), num_images).interval


@dataclass(frozen=True)
class Verdict:
    """The result as sentences.

    Attributes:
        sentence: What won, by how much and how sure, in one sentence.
        details: How the winner was chosen, and what the numbers cannot show.
    """

    sentence: str
    details: tuple[str, ...]


def has_interval(metric: Metric) -> bool:
    """Return whether the report computes intervals: of the accuracy, a share of independent images.

    Other metrics are means over classes, over pairs of images, or of unbounded losses.
    """
    return metric is METRICS[DEFAULT_METRIC]


def choose_rival(leader: TrialSummary, others: Sequence[TrialSummary]) -> TrialSummary | None:
    """Return the trial that the leader is compared with, or None.

    It is the best trial of CE-tuning; if that leads, the best of another method; and if there is
    only one method, the runner-up.

    Args:
        leader: The winner, or the best trial so far.
        others: Comparable trials, the best first.
    """
    rest = [trial for trial in others if trial.number != leader.number]
    if _method(leader) == CE_TUNING:
        preferred = [trial for trial in rest if _method(trial) != CE_TUNING]
    else:
        preferred = [trial for trial in rest if _method(trial) == CE_TUNING]
    return next(iter([*preferred, *rest]), None)


def are_told_apart(leader: Candidate, rival: Candidate, num_images: int) -> bool:
    """Return whether the leader is better beyond doubt.

    Their intervals must not overlap, and on every seed that both were trained on the leader must
    be ahead. Never true without intervals.
    """
    ours, theirs = leader.interval(num_images), rival.interval(num_images)
    if ours is None or theirs is None:
        return False
    num_ahead, num_seeds = _seeds_ahead(leader, rival)
    return ours[0] > theirs[1] and num_ahead == num_seeds


def _seeds_ahead(leader: Candidate, rival: Candidate) -> tuple[int, int]:
    """Return on how many of the new seeds of both the leader is ahead, and how many these are."""
    score = leader.metric.score
    pairs = list(zip(leader.values, rival.values, strict=False))
    return sum(score(ours) > score(theirs) for ours, theirs in pairs), len(pairs)


def verdict(
    leader: Candidate | None,
    rival: Candidate | None,
    num_images: int,
    num_completed: int,
    *,
    is_finished: bool,
    outcomes: Sequence[str] = (),
) -> Verdict:
    """Put the result into words.

    Args:
        leader: The winner, or the best so far; None if no trial has a value that counts.
        rival: What it is compared with.
        num_images: Number of validation images; 0 if unknown.
        num_completed: Number of completed trials of the search.
        is_finished: Whether the study has chosen its winner.
        outcomes: Outcomes of the trials that ended, for a study without a result.
    """
    if leader is None:
        return _without_result(outcomes, is_finished)
    verb = "won" if is_finished else "leads so far"
    parts = [
        f"{_capital(leader.name)} ({leader.origin}) {verb} with "
        f"{_measured(leader)}{_interval(leader, num_images)}"
    ]
    if rival is not None:
        parts.append(_comparison(leader, rival, num_images))
    return Verdict(", ".join(parts) + ".", _details(leader, rival, num_images, num_completed))


def _without_result(outcomes: Sequence[str], is_finished: bool) -> Verdict:
    ends = f" ({', '.join(outcomes)})" if outcomes else ""
    if is_finished:
        return Verdict(f"No trial completed{ends}: the study has no winner.", ())
    return Verdict(f"No trial has completed yet{ends}: there is nothing to compare.", ())


def _measured(leader: Candidate) -> str:
    value = figure(leader.metric, leader.value)
    if has_interval(leader.metric):
        return f"a {leader.metric.label} of {value}"
    if leader.metric.direction == "minimize":
        return f"{value} ({leader.metric.label}, the lower the better)"
    return f"{value}{by(leader.metric)}"


def _gap(leader: Candidate, rival: Candidate) -> str:
    """Return how far the leader is above or below: in points for shares, else as a number."""
    gap = leader.value - rival.value
    shown = f"{100 * abs(gap):.2f} points" if leader.metric.is_share else f"{abs(gap):.4f}"
    if float(shown.split()[0]) == 0:
        return "as much as"
    return f"{shown} {'above' if gap > 0 else 'below'}"


def _comparison(leader: Candidate, rival: Candidate, num_images: int) -> str:
    value = figure(rival.metric, rival.value)
    other = f"{rival.method} ({rival.name}, {value})"
    if leader.method == rival.method:
        other = f"{rival.name} ({value})"
    text = f"{_gap(leader, rival)} {other}"
    if not has_interval(leader.metric):
        return f"{text}{_without_interval(leader, rival)}"
    if not num_images:
        return text
    if are_told_apart(leader, rival, num_images):
        return f"{text}, beyond the 95 % intervals of both"
    return f"{text}: with {_images(num_images)} the two cannot be told apart"


def _without_interval(leader: Candidate, rival: Candidate) -> str:
    num_ahead, num_seeds = _seeds_ahead(leader, rival)
    if num_seeds >= MIN_SEEDS and num_ahead == num_seeds:
        return f", ahead on each of {num_seeds} seeds; no interval is computed for this metric"
    seeds = f"ahead on {num_ahead} of {num_seeds} seeds" if num_seeds > 1 else "on one seed each"
    return f", {seeds}; no interval is computed for this metric: the two cannot be told apart"


def _interval(candidate: Candidate, num_images: int) -> str:
    found = candidate.interval(num_images)
    if found is None:
        return ""
    low, high = found
    return f" (95 % interval {percent(low)} to {percent(high)})"


def _details(
    leader: Candidate, rival: Candidate | None, num_images: int, num_completed: int
) -> tuple[str, ...]:
    found, metric = [], leader.metric
    if leader.values:
        values = ", ".join(figure(metric, value) for value in leader.values)
        found.append(
            f"The {noun(metric)} is the mean over {len(leader.values)} new seeds ({values}), which "
            "took no part in the search."
        )
    else:
        extreme = "maximum" if metric.direction == "maximize" else "minimum"
        found.append(
            f"The {noun(metric)} is the {extreme} over {num_completed} completed trials, each "
            "trained on one seed, and therefore optimistic."
        )
    if rival is not None and not has_interval(metric):
        found.append(
            f"No interval is computed for the {noun(metric)}. The report says only whether the "
            "winner is ahead on every new seed that both were trained on; with few seeds, chance "
            "alone can do that."
        )
    elif rival is not None and num_images:
        found.append(
            "Two configurations are told apart here only if the intervals of their accuracies on "
            f"{_images(num_images)} do not overlap and every seed agrees. That is a cautious rule: "
            "both classify the same images."
        )
    return tuple(found)


def _images(number: int) -> str:
    return "1 validation image" if number == 1 else f"{number} validation images"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _method(trial: TrialSummary) -> str:
    return str(trial.config.get("method", {}).get("name", ""))
