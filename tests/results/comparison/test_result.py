"""What a comparison records and shows: files, table, page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from drtune_ray.display.comparison import comparison_facts, comparison_lines
from drtune_ray.results.comparison.answers import StoredAnswers, read_answers, write_answers
from drtune_ray.results.comparison.compared import compare
from drtune_ray.results.comparison.picture import comparison_page, write_page
from drtune_ray.results.comparison.result import (
    ANSWERS_NAME,
    RESULT_NAME,
    SEEDS_NAME,
    ComparisonResult,
    MethodRuns,
    read_result,
)
from tests.results.comparison.simulated import against, answers, gain_of

NAMES = {"ce_tuning": 0.0, "dr_tune": 0.08, "bss": -0.08, "<mine>": 0.0}


@pytest.fixture
def result(tmp_path: Path) -> ComparisonResult:
    gains = tuple(gain_of(d, of_seed=0.03) for d in NAMES.values())
    drawn = answers(np.random.default_rng(3), 8, 1000, gains, of_seed=0.03)
    compared = compare(dict(zip(NAMES, drawn.values(), strict=True)), against("ce_tuning", NAMES))
    methods = {
        name: MethodRuns(
            "ce_tuning",
            f"studies/flowers-{name}",
            ("optim.backbone_lr",),
            {"optim.backbone_lr": 0.001},
            12,
            120,
            3700.0,
            2.5,
            tuple(range(1, 9)),
            (0.9,) * 8,
            tuple(range(12, 20)),
            dr_gradient_share={"dr_tune": 0.34, "bss": 0.04}.get(name),
        )
        for name in NAMES
    }
    return ComparisonResult("flowers", tmp_path, "digest", methods, compared, 1, 1_790_000_000_000)


def test_result__is_read_as_it_was_written(result: ComparisonResult) -> None:
    result.write()
    assert read_result(result.folder) == result
    seeds = pq.read_table(result.folder / SEEDS_NAME)
    assert len(seeds) == len(NAMES) * 8
    first = seeds.to_pylist()[0]
    assert first["test_accuracy"] == result.compared.scores["ce_tuning"].accuracies[0]
    (result.folder / RESULT_NAME).write_text("{")
    assert read_result(result.folder) is None


def test_answers__are_read_as_they_were_written(tmp_path: Path) -> None:
    correct = {"a, seed 1": np.array([True, False]), "b, seed 1": np.array([False, False])}
    write_answers(tmp_path, StoredAnswers("digest", correct, ("x", "y"), 2, 17))
    found = read_answers(tmp_path)
    assert found is not None
    assert (found.models, found.hashes) == ("digest", ("x", "y"))
    assert (found.num_openings, found.time_ms) == (2, 17)
    assert {k: v.tolist() for k, v in found.correct.items()} == {
        k: v.tolist() for k, v in correct.items()
    }
    (tmp_path / ANSWERS_NAME).write_bytes(b"torn")
    assert read_answers(tmp_path) is None


def test_lines__the_answer_comes_first_and_every_method_has_a_row(result) -> None:
    text = "\n".join(comparison_lines(result))
    answer, rest = text.strip().split("\n", 1)
    assert re.match(
        r"DR-Tune is better than CE-tuning by \d\.\d points \(\d\.\d to \d+\.\d\)\.", answer
    )
    assert "BSS is worse than CE-tuning by" in rest
    assert "8 seeds a method, 1000 images of the sealed test split (opening 1)" in rest
    (row,) = re.findall(r"^  CE-tuning +\d.*$", rest, re.M)[:1]
    assert "baseline" in row
    assert "1 h 1 min" in rest and "120" in rest  # what it cost
    assert "the intervals cover seeds and test images, not what another search" in rest
    assert "DR-Tune: DR is 34 % of the head's gradient." in rest
    assert "BSS: DR is 4 % of the head's gradient, CE-tuning in all but name." in rest
    assert "CE-tuning: DR is" not in rest
    assert max(map(len, text.splitlines())) <= 132
    assert json.dumps(comparison_facts(result))


def test_page__one_picture_right_of_the_line_is_better(result) -> None:
    page = comparison_page(result)
    data = json.loads(re.findall(r'id="figures">(.*?)</script>', page, re.S)[0])
    figure = data["differences"]
    by_name = {trace["name"]: trace for trace in figure["data"]}
    assert by_name.keys() == {"DR-Tune", "BSS", "&lt;mine&gt;"}
    one, found = by_name["DR-Tune"], result.compared.differences["dr_tune"]
    assert one["x"] == [pytest.approx(100 * found.mean, rel=1e-5)]
    assert one["x"][0] - one["error_x"]["arrayminus"][0] == pytest.approx(
        100 * found.interval.low, rel=1e-4
    )
    assert one["x"][0] > 0 > by_name["BSS"]["x"][0]
    symbols = {name: trace["marker"]["symbol"] for name, trace in by_name.items()}
    assert symbols == {"DR-Tune": "circle", "BSS": "square", "&lt;mine&gt;": "circle-open"}
    low, high = figure["layout"]["xaxis"]["range"]
    assert low == -high
    assert "<mine>" not in page
    assert "DR-Tune: DR is 34&nbsp;% of the head" in page
    assert '<p class="verdict">DR-Tune is better than CE-tuning by' in page
    write_page(result)
    assert (result.folder / "comparison.html").read_text() == page
