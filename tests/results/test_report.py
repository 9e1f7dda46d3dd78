"""The report of a study: what it says, and that its file is whole, safe and small."""

from __future__ import annotations

import html as standard_html
import json
import math
import re
import statistics
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from drtune_ray.cli import cli
from drtune_ray.config.metric import METRICS
from drtune_ray.config.study import TRAINING
from drtune_ray.errors import ConfigError
from drtune_ray.results.class_tables import class_tables
from drtune_ray.results.evaluation_record import Accuracy, Evaluation, sha256_of, write_result
from drtune_ray.results.report import html
from drtune_ray.results.report.class_figures import MAX_CLASSES, confusion_figure
from drtune_ray.results.report.content import Content
from drtune_ray.results.report.curves import learning_curves
from drtune_ray.results.report.figure import Figure, label, opaque_in_legend
from drtune_ray.results.report.history import (
    COMPLETED,
    FAILED,
    IMPOSSIBLE,
    STOPPED,
    UNFINISHED,
    ends,
    kind_of,
)
from drtune_ray.results.report.page import plotly_script, report_page
from drtune_ray.results.report.sections import sections
from drtune_ray.results.report.settings import Axis, contour, importances, read_axes
from drtune_ray.results.report.space_figures import (
    contours,
    importance_figure,
    parallel_coordinates,
    pareto_figure,
    slices,
)
from drtune_ray.results.report.verdict import Candidate, Verdict, choose_rival, verdict
from drtune_ray.results.report.work_figures import timeline
from drtune_ray.results.trials import TrialSummary, best_first, summaries
from drtune_ray.storage.driver_lock import driver_lock
from drtune_ray.storage.record import REPORT_NAME, SPOOL_NAME, WINNER_NAME, read_record
from drtune_ray.study.report import report_study, write_final_report
from drtune_ray.study.report_content import gather
from drtune_ray.study.status import DONE, INTERRUPTED, RUNNING
from drtune_ray.study.status import FAILED as FAILED_STUDY
from drtune_ray.tracking.events import MetricsRecorded, RunFinished, RunStarted
from drtune_ray.tracking.machine_watch import CPU_ENERGY, GPU_ENERGY
from drtune_ray.tracking.spool import Spool
from tests import past_studies
from tests.results.made_studies import DIVERGED, LOST, MadeStudy, made_study
from tests.small_disks import small_files

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\"'&"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeStudy:
    """Thirty trials, one seed each."""
    folder = tmp_path_factory.mktemp("report") / "studies" / "flowers"
    return made_study(folder, 30, **{"finalists.num_seeds": 0})


@pytest.fixture(scope="module")
def content(made: MadeStudy) -> Content:
    return gather(made.record, state=DONE)


@pytest.fixture(scope="module", params=["val_accuracy", "log_loss"])
def either(
    request: pytest.FixtureRequest,
    made: MadeStudy,
    content: Content,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[MadeStudy, Content]:
    """The thirty trials as chosen by accuracy, and by log loss: minimised, and no share."""
    if request.param == "val_accuracy":
        return made, content
    folder = tmp_path_factory.mktemp("report") / "studies" / "losses"
    by_loss = made_study(folder, 30, objectives=[request.param], **{"finalists.num_seeds": 0})
    return by_loss, gather(by_loss.record, state=DONE)


def frozen_trials(made: MadeStudy) -> list[Any]:
    return made.study.get_trials(deepcopy=False)


def figures(content: Content) -> dict[str, Figure]:
    parts = [part for section in sections(content) for part in section.parts]
    return {part.key: part for part in parts if isinstance(part, Figure)}


def trial(
    number: int, best: float, method: str = "dr_tune", metric: str = "val_accuracy", **more: Any
) -> TrialSummary:
    values = {"state": "COMPLETE", "outcome": "completed", "reference": None, "num_epochs": 3}
    config = {"method": {"name": method}, "training": {"metric": metric}}
    values |= {"seconds": 1.0, "config": config} | more
    return TrialSummary(number, best_value=best, **values)


# ---- the sentence


def test_verdict__intervals_that_overlap_tell_nothing_apart() -> None:
    leader, rival = Candidate(trial(3, 0.86)), Candidate(trial(1, 0.84, "ce_tuning"))
    found = verdict(leader, rival, 100, 12, is_finished=True).sentence
    assert found == (  # Wilson's interval of 86 of 100
        "Trial 3 (DR-Tune) won with a validation accuracy of 86.00 % (95 % interval 77.86 % to "
        "91.47 %), 2.00 points above CE-tuning (trial 1, 84.00 %): with 100 validation images "
        "the two cannot be told apart."
    )


def test_verdict__intervals_that_do_not_overlap() -> None:
    leader, rival = Candidate(trial(3, 0.9)), Candidate(trial(1, 0.8, "ce_tuning"))
    found = verdict(leader, rival, 1000, 12, is_finished=True)
    assert "10.00 points above CE-tuning (trial 1, 80.00 %), beyond the 95 % intervals" in (
        found.sentence
    )
    assert "maximum over 12 completed trials" in " ".join(found.details)


def test_verdict__one_seed_behind_is_enough_for_doubt() -> None:
    rival = Candidate(trial(1, 0.8, "ce_tuning"), (0.80, 0.80, 0.93))
    sure = Candidate(trial(3, 0.9), (0.95, 0.95, 0.95))
    doubtful = Candidate(trial(3, 0.9), (0.99, 0.97, 0.92))
    said = [verdict(each, rival, 2000, 9, is_finished=True) for each in (sure, doubtful)]
    assert ["cannot be told apart" in each.sentence for each in said] == [False, True]
    assert f"accuracy of {statistics.fmean(doubtful.values):.2%}"[:-1] in said[1].sentence
    assert "mean over 3 new seeds" in said[1].details[0]


def test_verdict__a_minimised_metric_without_intervals() -> None:
    best = trial(3, 0.25, metric="log_loss")
    rival = Candidate(trial(1, 0.5, "ce_tuning", metric="log_loss"), (0.5, 0.625))
    sure, doubtful = Candidate(best, (0.25, 0.125)), Candidate(best, (0.125, 0.75))
    start = (
        "Trial 3 (DR-Tune) won with {} (log loss on the validation images, the lower the better)"
    )
    found = verdict(sure, rival, 5000, 9, is_finished=True)
    assert found.sentence == (
        f"{start.format('0.1875')}, 0.3750 below CE-tuning (trial 1, 0.5625), ahead on each of 2 "
        "seeds; no interval is computed for this metric."
    )
    assert found.details[0].startswith("The log loss is the mean over 2 new seeds (0.2500, 0.1250)")
    found = verdict(doubtful, rival, 5000, 9, is_finished=True)
    assert found.sentence == (
        f"{start.format('0.4375')}, 0.1250 below CE-tuning (trial 1, 0.5625), ahead on 1 of 2 "
        "seeds; no interval is computed for this metric: the two cannot be told apart."
    )
    alone = Candidate(best), Candidate(rival.trial)
    found = verdict(*alone, 5000, 9, is_finished=True)
    assert found.sentence == (
        f"{start.format('0.2500')}, 0.2500 below CE-tuning (trial 1, 0.5000), on one seed each; no "
        "interval is computed for this metric: the two cannot be told apart."
    )
    assert "The log loss is the minimum over 9 completed trials" in found.details[0]
    assert "95 %" not in " ".join((found.sentence, *found.details))


def test_verdict__shares_have_points_and_only_accuracy_has_intervals() -> None:
    pair = [Candidate(trial(n, best, metric="macro_f1")) for n, best in ((2, 0.75), (1, 0.5))]
    said = verdict(pair[0], pair[1], 1000, 2, is_finished=True).sentence
    assert said.startswith(
        "Trial 2 (DR-Tune) won with 75.00 % (macro F1 on the validation images), 25.00 points "
        "above trial 1 (50.00 %), on one seed each; no interval"
    )
    worse = Candidate(trial(1, 0.25, metric="calibration_error"))
    better = Candidate(trial(2, 0.125, metric="calibration_error"))
    said = verdict(better, worse, 1000, 2, is_finished=True).sentence
    assert "12.50 % (calibration error, the lower the better), 12.50 points below" in said


def test_verdict__ce_tuning_that_wins_is_compared_with_dr_tune() -> None:
    trials = [trial(1, 0.9, "ce_tuning"), trial(2, 0.89, "ce_tuning"), trial(3, 0.85)]
    assert choose_rival(trials[0], trials) == trials[2]
    assert choose_rival(trials[2], trials) == trials[0]
    assert choose_rival(trials[0], trials[:2]) == trials[1]
    assert choose_rival(trials[0], trials[:1]) is None
    found = verdict(Candidate(trials[0]), Candidate(trials[2]), 0, 3, is_finished=True)
    assert found.sentence == (
        "Trial 1 (CE-tuning) won with a validation accuracy of 90.00 %, 5.00 points above DR-Tune "
        "(trial 3, 85.00 %)."
    )


def test_verdict__without_a_result() -> None:
    ended = verdict(None, None, 10, 0, is_finished=True, outcomes=["3 diverged"])
    assert ended == Verdict("No trial completed (3 diverged): the study has no winner.", ())
    going = verdict(None, None, 10, 0, is_finished=False)
    assert going.sentence.startswith("No trial has completed yet")


# ---- what the trials did


def test_gather__the_leader_is_the_best_completed_trial(
    either: tuple[MadeStudy, Content],
) -> None:
    made, content = either
    completed = [t for t in frozen_trials(made) if t.state == TrialState.COMPLETE]
    choose = min if made.study.direction.name == "MINIMIZE" else max
    best = choose(completed, key=lambda t: t.value)
    assert content.leader is not None
    assert content.leader.number == best.number
    assert content.num_images == 100
    ce_tuning = next(t for t in completed if t.user_attrs.get("reference") == "ce_tuning")
    assert f"trial {best.number}" in content.verdict.sentence.lower()
    assert f"CE-tuning (trial {ce_tuning.number}, " in content.verdict.sentence


def test_history__metrics_and_costs_are_those_of_the_events(
    made: MadeStudy, content: Content
) -> None:
    events = list(made.spool.events.events())
    measured = [e for e in events if isinstance(e, MetricsRecorded)]
    starts = [e.time_ms for e in events if isinstance(e, RunStarted)]
    finished = {e.number: e.time_ms for e in events if isinstance(e, RunFinished)}
    begun = {e.number: e.time_ms for e in events if isinstance(e, RunStarted)}
    cost = content.history.cost
    assert cost is not None
    assert cost.num_epochs == len(measured)
    assert cost.wall_seconds == pytest.approx((max(finished.values()) - min(starts)) / 1000)
    assert cost.trial_seconds == pytest.approx(sum(finished[n] - begun[n] for n in finished) / 1000)
    wasted = [t.number for t in content.trials if t.state != "COMPLETE"]
    assert cost.stopped_seconds == pytest.approx(sum(finished[n] - begun[n] for n in wasted) / 1000)
    first = measured[0]
    epochs, values = content.history.curve(first.number, "val_accuracy")
    assert (epochs[0], values[0]) == (1, first.metrics["val_accuracy"])


def test_history__time_until_the_first_epoch_with_the_best_value(
    either: tuple[MadeStudy, Content],
) -> None:
    made, content = either
    events = list(made.spool.events.events())
    start = min(e.time_ms for e in events if isinstance(e, RunStarted))
    measured = [e for e in events if isinstance(e, MetricsRecorded)]
    choose = min if content.metric.direction == "minimize" else max
    best = choose(e.metrics[content.metric.measure] for e in measured)
    first = min(e.time_ms for e in measured if e.metrics[content.metric.measure] == best)
    assert content.history.cost is not None
    assert content.history.cost.best_after_seconds == pytest.approx((first - start) / 1000)


def test_cost__has_energy_where_counters_were_read(tmp_path: Path, content: Content) -> None:
    assert content.history.cost is not None and content.history.cost.energy_joules is None
    assert "energy of the CPUs" not in own_part(report_page(content))
    made = made_study(tmp_path / "studies" / "flowers", 3)
    for step, joules in enumerate((9000.0, 5400.0), 1):
        energies = {CPU_ENERGY: joules, GPU_ENERGY: 2 * joules}
        made.spool.append(MetricsRecorded(None, step, energies | {"system/other": 1.0}))
    text = own_part(report_page(gather(made.record, state=DONE)))
    (row,) = re.findall(r"<tr>[^\n]*?energy of the CPUs and GPUs of the machine.*?</tr>", text)
    assert "12.0 Wh" in row


def test_history__spans_of_a_lane_never_overlap(content: Content) -> None:
    by_lane: dict[tuple[str, int], list[Any]] = {}
    for span in content.history.spans:
        by_lane.setdefault((span.host, span.lane), []).append(span)
    assert len(by_lane) == 4
    for spans in by_lane.values():
        assert all(a.end_ms <= b.start_ms for a, b in zip(spans, spans[1:], strict=False))


def test_kinds_of_ends(content: Content) -> None:
    assert kind_of(trial(0, 0.5)) == COMPLETED
    assert kind_of(trial(0, 0.5, state="PRUNED", outcome="stopped by the budget")) == STOPPED
    assert kind_of(trial(0, 0.5, state="PRUNED", outcome="out of memory")) == IMPOSSIBLE
    assert kind_of(trial(0, 0.5, state="FAIL", outcome=LOST)) == FAILED
    assert kind_of(trial(0, 0.5, state="RUNNING", outcome="")) == UNFINISHED
    counted = {outcome: number for _, outcome, number in ends(content.trials)}
    assert counted[DIVERGED] == sum(t.outcome == DIVERGED for t in content.trials)
    assert sum(counted.values()) == 30


def test_learning_curves__a_stopped_trial_ends_in_a_mark_at_its_last_epoch(
    content: Content,
) -> None:
    figure = learning_curves(content)
    assert figure is not None
    marks = next(t for t in figure.data if t["mode"] == "markers" and t["legendgroup"] == STOPPED)
    stopped = [t for t in content.trials if kind_of(t) == STOPPED]
    assert marks["customdata"] == [t.number for t in stopped]
    assert marks["x"] == [t.num_epochs for t in stopped]
    line = next(t for t in figure.data if t["mode"] == "lines" and t.get("legendgroup") == STOPPED)
    assert line["y"].count(None) == len(stopped)  # a gap after each trial


def test_learning_curves__are_of_the_metric_that_chooses(either: tuple[MadeStudy, Content]) -> None:
    made, content = either
    figure = learning_curves(content)
    assert figure is not None and content.leader is not None
    assert figure.data[-1]["name"] == f"trial {content.leader.label}"
    events = [e for e in made.spool.events.events() if isinstance(e, MetricsRecorded)]
    values = [
        e.metrics[content.metric.measure] for e in events if e.number == content.leader.number
    ]
    assert figure.data[-1]["y"] == pytest.approx(values, rel=1e-5)
    axis = figure.layout["yaxis"]
    is_loss = content.metric is METRICS["log_loss"]
    assert axis["title"]["text"] == content.metric.label
    assert axis.get("tickformat") == (None if is_loss else ".0%")
    assert figure.caption.startswith(
        "Log loss on the validation images by epoch" if is_loss else "Validation accuracy by epoch"
    )
    assert all(
        (":.4f}" if is_loss else ":.2%}") in t["hovertemplate"]
        for t in figure.data
        if t["x"] != [None]
    )


# ---- settings


def test_axes__values_are_those_of_the_configurations(content: Content) -> None:
    by_path = {axis.path: axis for axis in content.axes}
    assert by_path["method.regularization_weight"].name == "lambda"
    for each in content.searched:
        is_ce = each.config["method"]["name"] == "ce_tuning"
        value = by_path["method.regularization_weight"].values[each.number]
        assert (value is None) == is_ce  # it ignores lambda
        rate = by_path["optim.backbone_lr"].values[each.number]
        assert rate == each.config["optim"]["backbone_lr"]
    assert by_path["optim.backbone_lr"].is_log


@pytest.mark.parametrize("metric", ["val_accuracy", "log_loss"])
def test_importances__the_setting_that_decides_comes_first(tmp_path: Path, metric: str) -> None:
    made = MadeStudy(tmp_path / "studies" / "one", objectives=[metric])
    for number in range(24):
        asked = made._asked.ask()
        config = made.space.suggest(asked, made.config.trial)
        low, high = 1e-4, 1e-1
        rate = math.log(asked.params["optim.backbone_lr"] / low) / math.log(high / low)
        curve = [0.5 + 0.4 * rate + 1e-6 * number]
        end = ("COMPLETE", "completed")
        made.trial(config, asked.params, asked.distributions, end=end, curve=curve)
    frozen = frozen_trials(made)
    found = importances(frozen, read_axes(frozen, summaries(frozen)), METRICS[metric])
    assert set(found.shares) == {"PED-ANOVA", "fANOVA"}
    for shares in found.shares.values():
        assert sum(shares.values()) == pytest.approx(1.0)
        assert max(shares, key=lambda name: shares[name]) == "lr"
    assert found.num_trials == 24


def test_importances__too_few_trials_or_no_difference(tmp_path: Path) -> None:
    few = made_study(tmp_path / "studies" / "few", 5)
    frozen = frozen_trials(few)
    metric = METRICS["val_accuracy"]
    assert "fewer than 8" in importances(frozen, read_axes(frozen, summaries(frozen)), metric).note
    equal = MadeStudy(tmp_path / "studies" / "equal")
    for _ in range(9):
        asked = equal._asked.ask()
        config = equal.space.suggest(asked, equal.config.trial)
        known = (config, asked.params, asked.distributions)
        equal.trial(*known, end=("COMPLETE", "completed"), curve=[0.5])
    frozen = frozen_trials(equal)
    found = importances(frozen, read_axes(frozen, summaries(frozen)), metric)
    assert (found.shares, found.note) == ({}, "all accuracies are equal")


def test_importances__ped_anova_is_among_the_best_in_the_metric_s_direction(
    tmp_path: Path,
) -> None:
    made = MadeStudy(tmp_path / "studies" / "two", objectives=["log_loss"])
    for number in range(40):  # good trials need one rate; bad ones differ by lambda alone
        asked = made._asked.ask()
        config = made.space.suggest(asked, made.config.trial)
        rate = math.log10(asked.params["optim.backbone_lr"])
        weight = math.log10(config.to_mapping()["method"]["regularization_weight"] or 1e-6)
        made.trial(
            config,
            asked.params,
            asked.distributions,
            end=("COMPLETE", "completed"),
            curve=[max(0.05, 0.9 - 0.1 * abs(rate + 2.5) - 0.001 * abs(weight) - 1e-6 * number)],
        )
    frozen = frozen_trials(made)
    axes, metric = read_axes(frozen, summaries(frozen)), METRICS["log_loss"]
    found = importances(frozen, axes, metric).shares["PED-ANOVA"]
    other = importances(frozen, axes, METRICS["val_accuracy"]).shares["PED-ANOVA"]
    assert found["lr"] > 0.5 and found != other


def test_parallel_coordinates__the_darkest_lines_are_the_best(
    either: tuple[MadeStudy, Content],
) -> None:
    content = either[1]
    figure = parallel_coordinates(content)
    assert figure is not None and content.leader is not None
    lines = {t["line"]["color"]: t for t in figure.data}
    numbers = {
        colour: {int(text.split(":")[0].split()[1]) for text in t["text"] if text}
        for colour, t in lines.items()
    }
    completed = [t for t in content.searched if t.state == "COMPLETE"]
    is_loss = content.metric is METRICS["log_loss"]
    ranked = sorted(completed, key=lambda t: t.best_value or 0.0, reverse=is_loss)
    fifth = len(ranked) // 5
    assert {t.number for t in ranked[:fifth]} == numbers["--line0"]
    assert {t.number for t in ranked[-fifth:]} <= numbers["--line4"]
    assert content.leader.number in numbers["--line4"]
    name = "lowest fifth" if is_loss else "highest fifth"
    assert lines["--line4"]["name"].startswith(name)
    assert ("the lower the log loss" if is_loss else "the higher the accuracy") in figure.caption
    assert figure.layout["xaxis"]["ticktext"][-1] == ("log loss" if is_loss else "accuracy")
    assert all(("%" in text) != is_loss for text in lines["--winner"]["text"][-2:-1])


def test_figures_of_the_space__name_the_metric(either: tuple[MadeStudy, Content]) -> None:
    content = either[1]
    is_loss = content.metric is METRICS["log_loss"]
    name = "log loss" if is_loss else "accuracy"
    importance = importance_figure(content)
    assert importance is not None
    assert importance.caption.startswith(f"Share of the variation of the {name} that each setting")
    assert {f.layout["yaxis"]["title"]["text"] for f in slices(content)} == {name}
    label = "Log loss on the validation images" if is_loss else "Validation accuracy"
    surfaces = [t for f in contours(content) for t in f.data if t["type"] == "contour"]
    assert surfaces and all(t["reversescale"] == is_loss for t in surfaces)  # the best is dark
    assert all(f.caption.startswith(f"{label} over ") for f in contours(content))
    own = own_part(report_page(content))
    assert (">best log loss<" in own, ">best accuracy<" in own) == (is_loss, not is_loss)
    assert f"until the search&#x27;s best {name}" in own


def test_contour__a_plane_is_met_exactly_and_nothing_is_invented_outside() -> None:
    places = [(1.0, 0.0), (100.0, 0.0), (1.0, 4.0), (10.0, 2.0)]
    x = Axis("x", "x", True, {n: a for n, (a, _) in enumerate(places)})
    y = Axis("y", "y", False, {n: b for n, (_, b) in enumerate(places)})
    plane = {n: 0.1 + 0.2 * math.log10(a) + 0.05 * b for n, (a, b) in enumerate(places)}
    found = contour(x, y, plane)
    assert found is not None
    inside = 0
    for j, row in enumerate(found.z):
        for i, value in enumerate(row):
            if value is not None:
                inside += 1
                expected = 0.1 + 0.2 * math.log10(found.x[i]) + 0.05 * found.y[j]
                assert value == pytest.approx(expected)
    assert 0.4 < inside / len(found.z) ** 2 < 0.6  # a triangle
    line = {n: (float(n), float(n)) for n in range(5)}
    first = Axis("x", "x", False, {n: a for n, (a, _) in line.items()})
    assert contour(first, first, {n: 0.5 for n in line}) is None


def test_pareto__front_of_the_definition(tmp_path: Path) -> None:
    objectives = ["val_accuracy", "latency_ms"]
    made = made_study(tmp_path / "studies" / "two", 20, objectives=objectives)
    content = gather(made.record, state=DONE)
    points = {
        t.number: (t.objectives["val_accuracy"], -t.objectives["latency_ms"])
        for t in content.searched
        if t.state == "COMPLETE"
    }
    front = {
        n
        for n, mine in points.items()
        if not any(
            other != mine and min(a - b for a, b in zip(other, mine, strict=True)) >= 0
            for other in points.values()
        )
    }
    assert set(content.front) == front
    figure = pareto_figure(content)
    assert figure is not None and figure.table is not None
    assert len(figure.table.rows) == len(front)


# ---- the page


class Page(HTMLParser):
    """What a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action") or (name == "href" and tag != "a"):
                self.loaded.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value or "")
            if name == "href" and tag == "a":
                self.links.append(value or "")


def own_part(page: str) -> str:
    """The page without Plotly's script, and with plain spaces."""
    assert page.count(plotly_script()) == 1
    return page.replace(plotly_script(), "").replace("&nbsp;", " ")


def test_page__loads_nothing_and_its_links_lead_somewhere(content: Content) -> None:
    own = own_part(report_page(content))
    assert "http:" not in own and "https:" not in own
    page = Page(own)
    assert page.loaded == [] and page.handlers == []
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert page.tags.count("script") == 3
    assert "default-src 'none'" in own


def test_page__every_figure_is_one_that_plotly_knows(either: tuple[MadeStudy, Content]) -> None:
    content = either[1]
    found = figures(content)
    assert {
        "learning-curves",
        "parallel-coordinates",
        "importance",
        "timeline",
        "contour-lambda-k",
        "contour-lambda-lr",
        "slice-optim-backbone-lr",
        "diagnostic-semantic-drift",
    } <= set(found)
    for figure in found.values():
        text = json.dumps([list(figure.data), figure.layout])
        data, layout = json.loads(re.sub(r'"--\w+"', '"#123456"', text))
        go.Figure({"data": data, "layout": layout})  # refuses unknown keys and values


def test_page__one_container_for_each_figure(content: Content) -> None:
    page = report_page(content)
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert set(json.loads(data)) == set(figures(content)) <= set(Page(own_part(page)).ids)


def test_page__hostile_names_stay_texts(content: Content) -> None:
    names = [HOSTILE, "<b>bold</b>", "plain"]
    tables = class_tables([0, 1, 2, 0], [[0.1, 0.8, 0.1]] * 4, names)
    from dataclasses import replace

    from drtune_ray.results.report.predictions import Predictions, Wrong

    wrong = Wrong(f"{HOSTILE}/x.png", HOSTILE, "plain", 0.9, "")
    bad = trial(0, 0.5, outcome=HOSTILE, state="FAIL", config={"method": {"name": HOSTILE}})
    hostile = replace(
        content,
        name=HOSTILE,
        state=HOSTILE,
        facts={HOSTILE: HOSTILE},
        trials=(*content.trials, bad),
        predictions=Predictions(tables, (wrong,)),
        openings=({"time_ms": 0, "model": HOSTILE},),
        notes=(HOSTILE,),
    )
    own = own_part(report_page(hostile))
    page = Page(own)
    assert page.tags.count("script") == 3 and "img" not in page.tags
    assert page.handlers == []
    assert HOSTILE not in own
    assert standard_html.escape("<b>bold</b>") in own
    matrix = confusion_figure(tables)
    assert matrix.layout["xaxis"]["ticktext"][1] == "&lt;b&gt;bold&lt;/b&gt;"


def test_page__three_hundred_trials_stay_below_eight_megabytes(tmp_path: Path) -> None:
    made = made_study(tmp_path / "studies" / "many", 300, **{"finalists.num_seeds": 0})
    page = report_page(gather(made.record, state=DONE))
    assert len(page.encode()) < 8_000_000
    assert len(own_part(page).encode()) < 1_500_000


def test_confusion_figure__of_many_classes_those_that_are_confused() -> None:
    number = MAX_CLASSES + 25
    labels = list(range(number)) * 2
    shares = [[0.9 if j == i else 0.1 / number for j in range(number)] for i in labels]
    shares[3], shares[60] = shares[60], shares[3]  # classes 3 and 60 are taken for each other
    figure = confusion_figure(class_tables(labels, shares, [f"c{i}" for i in range(number)]))
    shown = figure.layout["xaxis"]["ticktext"]
    assert len(shown) == MAX_CLASSES and {"c3", "c60"} <= set(shown)
    assert "25 classes" in figure.caption
    assert figure.table is not None and len(figure.table.rows) == 2


def test_table__cells() -> None:
    shown = html.table(["a", "b"], [["x<y", 0.123456], ["z", None]])
    assert '<th scope="row">x&lt;y</th><td class="number">0.1235</td>' in shown
    assert "<td></td>" in shown


# ---- studies that are not done


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_report__of_a_running_study_changes_nothing_else(tmp_path: Path) -> None:
    made = made_study(tmp_path / "studies" / "flowers", 6, trials=20)
    config = made.config.trial
    made.trial(config, {}, {}, end=("RUNNING", ""), curve=[0.3, 0.95])
    with driver_lock(made.folder):
        before = everything(made.folder)
        path = report_study("flowers", str(made.folder.parent))
        after = everything(made.folder)
    assert path == made.folder / REPORT_NAME
    assert after.pop(str(path))
    assert after == before
    content = gather(made.record, state=RUNNING)
    assert content.leader is not None and content.leader.number != 6  # a completed one
    assert " leads so far " in content.verdict.sentence
    assert content.predictions is None and content.why_no_predictions == "There is no model yet."
    own = own_part(path.read_text())
    assert "7 of 20 ended" not in own and "6 of 20 ended" in own
    assert UNFINISHED in own


@pytest.mark.parametrize("metric", ["val_accuracy", "log_loss"])
def test_report__before_the_first_trial_and_before_the_first_epoch(
    tmp_path: Path, metric: str
) -> None:
    made = MadeStudy(tmp_path / "studies" / "new", objectives=[metric])
    assert "nothing to compare" in own_part(report_page(gather(made.record, state=RUNNING)))
    for accuracy in (0.4, 0.6, 0.5):
        made.trial(made.config.trial, {}, {}, end=("RUNNING", ""), curve=[accuracy])
    content = gather(made.record, state=RUNNING)
    assert content.leader is not None and content.leader.number == 1
    assert "leads so far" in content.verdict.sentence
    report_page(content)


def test_report__no_trial_completed(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "studies" / "bad")
    for _ in range(3):
        asked = made._asked.ask()
        config = made.space.suggest(asked, made.config.trial)
        end = ("PRUNED", DIVERGED)
        made.trial(config, asked.params, asked.distributions, end=end, curve=[0.2])
    content = gather(made.record, state=DONE)
    assert content.verdict.sentence == "No trial completed (3 diverged): the study has no winner."
    assert content.leader is None
    own = own_part(report_page(content))
    assert "The study has no model." in own and "diverged" in own


def test_report__events_that_were_lost(tmp_path: Path) -> None:
    made = made_study(tmp_path / "studies" / "restored", 8)
    for path in (made.folder / SPOOL_NAME).iterdir():
        path.unlink()
    content = gather(made.record, state=INTERRUPTED)
    assert len(content.history.spans) == 8  # from Optuna
    assert learning_curves(content) is not None  # best so far
    assert timeline(content) is not None
    (made.folder / SPOOL_NAME).rmdir()
    report_page(gather(made.record, state=INTERRUPTED))
    assert not (made.folder / SPOOL_NAME).exists()


def hold_finals(made: MadeStudy, accuracies: Iterable[tuple[TrialSummary, float]]) -> None:
    """Repeat trials on two new seeds: about this accurate."""
    for source, accuracy in accuracies:
        for seed in (1, 2):
            name = f"trial {source.number}, seed {source.config['seed'] + seed}"
            curve = [accuracy + 0.01 * seed]
            end = ("COMPLETE", "completed")
            made.trial(made.config.trial, {}, {}, end=end, curve=curve, finalist=name)


@pytest.mark.parametrize("metric", ["val_accuracy", "log_loss"])
def test_report__the_rival_is_the_best_finalist_of_another_method(
    tmp_path: Path, metric: str
) -> None:
    changes: dict[str, Any] = {"finalists.num_seeds": 2, "objectives": [metric]}
    made = made_study(tmp_path / "studies" / "rival", 12, **changes)
    ranked = best_first(gather(made.record, state=DONE).trials)
    ce = next(t for t in ranked if t.config["method"]["name"] == "ce_tuning")
    assert ce not in ranked[:2]
    hold_finals(made, [(ranked[0], 0.6), (ranked[1], 0.7), (ce, 0.9)])
    content = gather(made.record, state=DONE)
    assert content.leader is not None and content.leader.number == ce.number
    assert f"DR-Tune (trial {ranked[1].number}, " in content.verdict.sentence


@pytest.mark.parametrize("metric", ["val_accuracy", "log_loss"])
def test_report__finalists_decide(tmp_path: Path, metric: str) -> None:
    changes: dict[str, Any] = {"finalists.num_seeds": 2, "objectives": [metric]}
    made = made_study(tmp_path / "studies" / "finals", 12, **changes)
    before = gather(made.record, state=DONE)
    ranked = sorted(
        (t for t in before.trials if t.state == "COMPLETE"),
        key=lambda t: t.best_value or 0.0,
        reverse=metric == "val_accuracy",
    )
    ce = next(t for t in ranked if t.config["method"]["name"] == "ce_tuning")
    hold_finals(made, [(ranked[0], 0.8), (ranked[1], 0.9), (ce, 0.5)])
    content = gather(made.record, state=DONE)
    assert content.leader is not None
    assert content.leader.number == ranked[1].number  # the search ranked it second
    assert len(content.searched) == 12
    said, own = content.verdict.sentence, own_part(report_page(content))
    if metric == "val_accuracy":
        assert "accuracy of 91.50 %" in said
        assert f"CE-tuning (trial {ce.number}, 51.50 %)" in said
        assert "beyond the 95 % intervals" in said
        assert content.finalists[1].values == (0.91, 0.92)
        assert ">95 % interval<" in own and ">91.00 %, 92.00 %<" in own
    else:
        values = [-math.log(accuracy) for accuracy in (0.91, 0.92)]
        assert content.finalists[1].values == pytest.approx(values)
        assert f"won with {statistics.fmean(values):.4f} (log loss" in said
        assert "ahead on each of 2 seeds; no interval is computed" in said
        assert "Finalists on new seeds (log loss on the validation images)" in own
        assert ">95 % interval<" not in own and f">{values[0]:.4f}, {values[1]:.4f}<" in own


# ---- a study that was run


@pytest.fixture
def past(tmp_path: Path) -> Path:
    return past_studies.install(tmp_path)


@pytest.mark.parametrize("version", [2, 3])
def test_command__a_finished_study(tmp_path: Path, version: int) -> None:
    folder = past_studies.install(tmp_path, version)
    done = CliRunner().invoke(cli, ["report", str(folder), "--output", str(tmp_path / "out.html")])
    assert done.exit_code == 0, done.output
    assert done.output == f"Report: {tmp_path / 'out.html'}\n"
    assert not (folder / REPORT_NAME).exists()
    own = own_part((tmp_path / "out.html").read_text())
    assert "won with a validation accuracy of 33.33 %" in own
    assert "cannot be told apart" in own
    assert "The test split has not been opened" in own
    assert own.count("data:image/jpeg;base64,") == 4  # of six images a third is right


def test_command__no_images(past: Path) -> None:
    path = past.parent / "small.html"
    command = ["report", str(past), "--output", str(path), "--no-images"]
    assert CliRunner().invoke(cli, command).exit_code == 0
    own = own_part(path.read_text())
    assert "data:image" not in own and "<img" not in own
    assert "green/" in own or "red/" in own  # their paths


def test_report__the_winner_on_the_validation_images(past: Path) -> None:
    content = gather(read_record(past), state=DONE)
    assert content.predictions is not None
    tables = content.predictions.tables
    assert tables.num_images == content.num_images == 6
    assert tables.accuracy == content.leader.best_val_accuracy  # type: ignore[union-attr]
    assert {"confusion-matrix", "reliability-diagram"} <= set(figures(content))
    assert len(content.predictions.worst) == 4
    folders = {wrong.path.split("/")[0] for wrong in content.predictions.worst}
    assert folders == {wrong.true for wrong in content.predictions.worst}


def test_report__images_that_are_away_leave_the_rest(past: Path) -> None:
    (past.parents[1] / "images").rename(past.parents[1] / "elsewhere")
    content = gather(read_record(past), state=DONE)
    assert content.predictions is None
    assert "cannot be applied to the validation images here" in content.why_no_predictions
    report_page(content)


def test_report__recorded_test_result_and_openings(past: Path) -> None:
    weights = past / WINNER_NAME / "model.safetensors"
    found = Evaluation(Accuracy(4, 6), None, None, 1, 1_790_000_000_000)
    write_result(past, weights, found)
    assert sha256_of(weights)
    content = gather(read_record(past), state=DONE)
    own = own_part(report_page(content))
    assert "Test accuracy 66.67 % (4 of 6 images" in own
    assert content.openings == ()  # none was recorded


def test_final_report__a_failure_is_not_the_study_s(past: Path, caplog) -> None:
    (past / "study.yaml").unlink()
    assert not write_final_report(past)
    assert "`drtune-ray report` tries again" in caplog.text


def test_final_report__a_disk_that_cannot_hold_it_is_one_line(past: Path, caplog) -> None:
    with small_files(2**20):
        assert not write_final_report(past)
    assert caplog.messages == [
        f"the report could not be written: {past / REPORT_NAME} cannot be used (File too large): "
        "make it accessible, move it away if it is in the place of another file, or bring it back "
        "from a backup; `drtune-ray report` tries again"
    ]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(("has_winner", "state"), [(True, DONE), (False, FAILED_STUDY)])
def test_final_report__before_the_study_is_marked_as_done(
    past: Path, has_winner: bool, state: str
) -> None:
    (past / "done").unlink()
    before = everything(past)
    assert write_final_report(past, has_winner=has_winner)
    after = everything(past)
    assert f"({state})" in own_part((past / REPORT_NAME).read_text())
    assert after.pop(str(past / REPORT_NAME)) and after == before


def test_report__a_training_has_none(made: MadeStudy, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = tmp_path / "studies" / "one-train"
    folder.mkdir(parents=True)
    replace(made.record, folder=folder, kind=TRAINING).write()
    with pytest.raises(ConfigError, match="is a training of one configuration"):
        report_study("one-train", str(folder.parent))


def test_report__reaches_mlflow(past: Path) -> None:
    report_study(str(past), str(past.parent))
    sent = [event.path for event in Spool(past / SPOOL_NAME).files.events()]
    assert str(past / REPORT_NAME) in sent


def test_label__keeps_both_ends_of_a_long_name() -> None:
    assert label("short & plain") == "short &amp; plain"
    assert [label(f"a class with a long name {i}", 20) for i in (1, 2)] == [
        "a class wi…ng name 1",
        "a class wi…ng name 2",
    ]


def test_opaque_in_legend__of_a_translucent_trace() -> None:
    line = {"color": "--line0", "width": 1.5, "dash": "dot"}
    trace = {"type": "scatter", "mode": "lines", "name": "some", "line": line, "opacity": 0.3}
    shown, drawn = opaque_in_legend(trace | {"x": [1, 2], "y": [3, 4]})
    assert (shown["showlegend"], drawn["showlegend"]) == (True, False)
    assert "opacity" not in shown and shown["line"] == line and shown["x"] == [None]
    assert drawn["x"] == [1, 2] and shown["legendgroup"] == drawn["legendgroup"] == "some"
