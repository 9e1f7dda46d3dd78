"""The statistics of a comparison: against definitions, against scipy, and by simulation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from drtune_ray.results.comparison.compared import (
    BETTER,
    SAME,
    TOO_FEW_SEEDS,
    UNDECIDED,
    WORSE,
    Compared,
    Difference,
    MethodScore,
    compare,
    compare_folds,
)
from drtune_ray.results.comparison.power import POINT, Spread
from drtune_ray.results.comparison.resampling import (
    FOLDS,
    Interval,
    resampled_means,
    t_interval,
    wider_interval,
)
from drtune_ray.results.comparison.significance import (
    bootstrap_p,
    corrected_resampled_t_test,
    holm,
    seeds_to_decide,
    sign_flip_p,
    smallest_p,
    t_test_p,
)
from drtune_ray.results.comparison.words import conclusion, sentence
from drtune_ray.results.words import title
from tests.results.comparison.simulated import against, answers, gain_of

RESAMPLES = 500


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(1)


# ---- intervals


def test_resampled_means__variance_of_crossed_resampling(random):
    """Variance of the pigeonhole bootstrap, written from its definition (Owen 2007)."""
    drawn = answers(random, 6, 40)
    means = resampled_means(drawn, num_resamples=20_000)
    found = float(np.var(means["a"] - means["b"]))
    d = drawn["a"].astype(float) - drawn["b"].astype(float)
    num_seeds, num_images = d.shape
    rows, columns = d.sum(1), d.sum(0)
    rest = d - d.mean(1)[:, None] - d.mean(0) + d.mean()
    expected = (
        ((rows - rows.mean()) ** 2).sum()
        + ((columns - columns.mean()) ** 2).sum()
        + (rest**2).sum()
    ) / (num_seeds * num_images) ** 2
    assert found == pytest.approx(expected, rel=0.05)
    assert np.mean(means["a"]) == pytest.approx(drawn["a"].mean(), abs=0.005)


def test_t_interval__equals_scipy(random):
    values = random.normal(0.8, 0.02, 7)
    interval = t_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert t_interval(values[:1]) is None


def test_wider_interval__is_the_wider_one(random):
    values = np.array([0.7, 0.9, 0.8])
    narrow, wide = random.normal(0.8, 0.001, 500), random.normal(0.8, 1.0, 500)
    assert wider_interval(values, narrow).kind == "t"
    assert wider_interval(values, wide).kind == "bootstrap"
    assert wider_interval(values[:1], narrow).kind == "bootstrap"


# ---- tests


def test_sign_flip__two_of_all_signs_when_all_agree():
    assert float(sign_flip_p(np.array([1.0, 2.0, 3.0, 0.5, 1.5, 2.5]))) == 2 / 2**6
    assert float(sign_flip_p(np.array([1.0, -1.0]))) == 1.0


def test_sign_flip__equals_the_definition(random):
    values = random.normal(0.3, 1.0, 7)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1)
    means = np.abs(signs.T @ values)
    expected = np.mean(means >= abs(values.sum()) - 1e-12)
    assert float(sign_flip_p(values)) == pytest.approx(expected)
    rows = np.stack([values, values[::-1] + 1])
    assert sign_flip_p(rows)[0] == pytest.approx(expected)


def test_sign_flip__equals_scipy(random):
    values = np.round(random.normal(0.3, 1.0, 8), 1)  # with equal sums
    found = stats.permutation_test((values,), np.mean, permutation_type="samples")
    assert float(sign_flip_p(values)) == pytest.approx(found.pvalue)


def test_sign_flip__of_many_seeds_is_drawn(random):
    values = random.normal(0.4, 1.0, 25)
    assert float(sign_flip_p(values)) == pytest.approx(float(t_test_p(values)), abs=0.02)


def test_t_test__equals_scipy_and_takes_equal_differences(random):
    one, other = random.normal(0, 1, 8), random.normal(0.5, 1, 8)
    assert float(t_test_p(one - other)) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert float(t_test_p(np.zeros(5))) == 1.0
    assert float(t_test_p(np.full(5, 0.25))) == 0.0


def test_bootstrap_p__ends_at_zero():
    means = np.linspace(-1, 3, 4001)
    assert bootstrap_p(means) == pytest.approx(0.5, abs=0.001)
    assert bootstrap_p(means + 10) == pytest.approx(2 / 4002)


def test_holm__by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_to_decide__smallest_p_after_holm():
    assert [seeds_to_decide(m) for m in (1, 2, 3, 8)] == [6, 7, 7, 9]
    assert smallest_p(6, 1) == 2 / 2**6 and smallest_p(2, 8) == 1.0
    for m in range(1, 20):
        assert smallest_p(seeds_to_decide(m), m) < 0.05 <= smallest_p(seeds_to_decide(m) - 1, m)


def test_corrected_resampled_t_test__by_hand():
    d = np.array([0.02, 0.03, 0.01, 0.04, 0.00])
    p, low, high = corrected_resampled_t_test(d, num_train=80, num_test=20)
    error = math.sqrt((1 / 5 + 20 / 80) * d.var(ddof=1))
    assert p == pytest.approx(2 * stats.t.sf(d.mean() / error, 4))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 4, d.mean(), error))
    assert p > stats.ttest_1samp(d, 0).pvalue
    assert corrected_resampled_t_test(np.zeros(4), 80, 20) == (1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least two folds"):
        corrected_resampled_t_test(d[:1], 80, 20)


def test_corrected_resampled_t_test__holds_its_level_where_the_plain_one_does_not(random):
    """Folds of the same images: random halves of one sample, so that their means are correlated."""
    called = {"corrected": 0, "plain": 0}
    for _ in range(400):
        sample = random.normal(0, 1, 60)
        folds = np.array([random.permutation(sample)[:12].mean() for _ in range(20)])
        called["corrected"] += corrected_resampled_t_test(folds, 48, 12)[0] < 0.05
        called["plain"] += stats.ttest_1samp(folds, 0).pvalue < 0.05
    assert called["corrected"] <= 0.1 * 400 < called["plain"]


# ---- coverage and power


def test_compare__of_500_without_a_difference_few_are_called_different(random):
    called = 0
    for index in range(500):
        found = compare(answers(random, 8, 150), {"b": "a"}, seed=index, num_resamples=RESAMPLES)
        called += found.differences["b"].verdict in (BETTER, WORSE)
    assert called <= 0.07 * 500


def test_compare__few_are_called_different_where_the_images_differ_most(random):
    """Each method has images of its own: an interval over seeds alone would be wrong."""
    called = over_seeds = 0
    for index in range(300):
        drawn = answers(random, 8, 60, of_seed=0.02, of_image=0.8)
        found = compare(
            drawn, against("a", drawn), seed=index, num_resamples=RESAMPLES
        ).differences["b"]
        called += found.verdict in (BETTER, WORSE)
        over_seeds += t_test_p(drawn["b"].mean(1) - drawn["a"].mean(1)) < 0.05
    assert called <= 0.07 * 300 < over_seeds


def test_compare__of_several_methods_rarely_one_is_called_different(random):
    called = 0
    for index in range(200):
        drawn = answers(random, 9, 100, (0.0,) * 6)
        found = compare(drawn, against("a", drawn), seed=index, num_resamples=RESAMPLES)
        called += any(each.verdict in (BETTER, WORSE) for each in found.differences.values())
    assert called <= 0.07 * 200


@pytest.mark.parametrize(
    ("difference", "num_images", "of_seed"), [(0.05, 400, 0.10), (0.06, 300, 0.15)]
)
def test_compare__the_power_is_what_the_table_promises(random, difference, num_images, of_seed):
    pilot = answers(random, 200, num_images, of_seed=of_seed)
    spread = Spread.of(pilot["b"].astype(float) - pilot["a"].astype(float))
    promised = spread.seeds_to_show(difference)
    assert promised is not None
    gain = gain_of(difference, of_seed=of_seed)
    shown = []
    for index in range(200):
        drawn = answers(random, promised, num_images, (0.0, gain), of_seed=of_seed)
        found = compare(drawn, against("a", drawn), seed=index, num_resamples=RESAMPLES)
        shown.append(found.differences["b"].verdict == BETTER)
    assert 0.72 <= np.mean(shown) <= 0.93, (promised, np.mean(shown))


def test_spread__of_known_parts(random):
    seeds, images = random.normal(0, 0.02, (400, 1)), random.normal(0, 0.3, 500)
    spread = Spread.of(seeds + images + random.normal(0, 0.5, (400, 500)))
    assert spread.of_seeds == pytest.approx(0.02**2 + 0.5**2 / 500, rel=0.2)
    assert spread.of_images == pytest.approx(0.3**2, rel=0.2)
    assert spread.of_rest == pytest.approx(0.5**2, rel=0.05)


def test_seeds_to_show__more_for_less_and_none_for_too_few_images():
    spread = Spread(of_seeds=0.02**2, of_images=0.0, of_rest=0.05, num_images=1000)
    small, large = spread.seeds_to_show(POINT), spread.seeds_to_show(5 * POINT)
    assert small is not None and large is not None and small > large
    assert spread.power(small, POINT) >= 0.8 > spread.power(small - 1, POINT)
    few = Spread(of_seeds=0.0004, of_images=0.09, of_rest=0.05, num_images=100)
    assert few.seeds_to_show(POINT) is None
    with_all_seeds_there_are = 0.09 * 2.80**2 / 0.01**2
    found = few.images_to_show(POINT)
    assert found is not None
    assert with_all_seeds_there_are * 0.99 <= found <= with_all_seeds_there_are * 1.1


@pytest.mark.parametrize(
    "spread",
    [
        Spread(of_seeds=0.0004, of_images=0.09, of_rest=0.05, num_images=100),
        # Two comparisons: 202 images would do with more seeds than there can be.
        Spread(of_seeds=0.00058, of_images=0.0021175, of_rest=0.12565, num_images=206),
    ],
)
def test_images_to_show__are_more_than_there_are_and_enough(spread):
    assert spread.seeds_to_show(POINT, 2) is None
    found = spread.images_to_show(POINT, 2)
    assert found is not None and found > spread.num_images
    assert replace(spread, num_images=found).seeds_to_show(POINT, 2) is not None


def test_images_to_show__none_where_the_seeds_differ_too_much():
    spread = Spread(of_seeds=0.2**2, of_images=0.01, of_rest=0.05, num_images=500)
    assert spread.seeds_to_show(POINT) is None and spread.images_to_show(POINT) is None


# ---- verdicts


def found_of(random, difference, num_seeds=10, num_images=3000, **more):
    gain = gain_of(difference, of_seed=0.03)
    drawn = answers(random, num_seeds, num_images, (0.0, gain), of_seed=0.03)
    return compare(
        {"ce_tuning": drawn["a"], "dr_tune": drawn["b"]}, {"dr_tune": "ce_tuning"}, **more
    )


def test_sentence__better_and_worse(random):
    better, worse = found_of(random, 0.03), found_of(random, -0.03)
    difference = better.differences["dr_tune"]
    assert difference.verdict == BETTER and worse.differences["dr_tune"].verdict == WORSE
    low, high = 100 * difference.interval.low, 100 * difference.interval.high
    assert conclusion(better) == (
        f"DR-Tune is better than CE-tuning by {100 * difference.mean:.1f} points "
        f"({low:.1f} to {high:.1f})"
    )
    worst = worse.differences["dr_tune"]
    assert sentence("dr_tune", worse) == (
        f"DR-Tune is worse than CE-tuning by {-100 * worst.mean:.1f} points "
        f"({-100 * worst.interval.high:.1f} to {-100 * worst.interval.low:.1f})"
    )
    assert conclusion(worse).startswith("CE-tuning is enough")


def test_sentence__cannot_be_told_apart(random):
    found = found_of(random, 0.0, num_images=400)
    difference = found.differences["dr_tune"]
    assert difference.verdict == UNDECIDED
    text = sentence("dr_tune", found)
    assert text.startswith("DR-Tune and CE-tuning cannot be told apart: ")
    if difference.more_seeds is None:
        assert f"about {difference.images_to_show} are needed" in text
    else:
        assert f"{difference.more_seeds} more seeds would show a difference of 1 point" in text


@pytest.mark.parametrize(
    ("needed", "images", "text"),
    [
        (24, 40, "14 more seeds would show a difference of 1 point"),
        (11, 40, "1 more seed would show a difference of 1 point"),
        (9, 40, "10 seeds are enough to show a difference of 1 point"),
        (None, 79, "on 50 test images: about 79 are needed"),
        (None, None, "the seeds differ too much to show a difference of 1 point with any number"),
    ],
)
def test_sentence__further_seeds_are_counted(monkeypatch, needed, images, text):
    interval = Interval(-0.01, 0.018, "t")
    spread = Spread(0.0001, 0.001, 0.01, 50)
    difference = Difference("ce_tuning", 0.004, interval, UNDECIDED, 0.5, 10, 1, spread)
    monkeypatch.setattr(Spread, "seeds_to_show", lambda *_: needed)
    score = MethodScore((0.9,) * 10, interval)
    scores = {"ce_tuning": score, "l2_sp": score}
    monkeypatch.setattr(Spread, "images_to_show", lambda *_: images)
    found = sentence("l2_sp", Compared(10, 50, scores, {"l2_sp": difference}))
    assert found.startswith("L2-SP and CE-tuning cannot be told apart: +0.4 points (-1.0 to 1.8);")
    assert found.endswith(text)


def test_sentence__too_few_seeds(random):
    found = found_of(random, 0.05, num_seeds=3)
    difference = found.differences["dr_tune"]
    assert (difference.verdict, difference.p) == (TOO_FEW_SEEDS, None)
    assert conclusion(found).endswith("cannot be decided with 3 seeds; 6 needed")
    one = found_of(random, 0.05, num_seeds=1)
    assert conclusion(one).endswith("cannot be decided with 1 seed; 6 needed")
    assert one.scores["dr_tune"].interval.kind == "bootstrap"


def test_identical_methods__no_difference(random):
    drawn = answers(random, 3, 50)["a"]
    found = compare({"ce_tuning": drawn, "again": drawn.copy()}, {"again": "ce_tuning"})
    assert found.differences["again"].verdict == SAME
    assert "no difference" in sentence("again", found)
    assert conclusion(found).startswith("CE-tuning is enough")


def test_conclusion__names_all_that_are_better_best_first(random):
    gains = (0.0, gain_of(0.05, of_seed=0.03), gain_of(0.09, of_seed=0.03))
    a, b, c = answers(random, 10, 3000, gains, of_seed=0.03).values()
    found = compare(
        {"ce_tuning": a, "bss": b, "mine": c}, {"bss": "ce_tuning", "mine": "ce_tuning"}
    )
    first, second = conclusion(found).split("; ")
    assert first.startswith("mine is better") and second.startswith("BSS is better")
    assert (title("bss"), title("mine")) == ("BSS", "mine")


def test_compared__through_json(random):
    found = found_of(random, 0.01, num_seeds=4, num_images=100)
    assert Compared.from_mapping(json.loads(json.dumps(found.to_mapping()))) == found


def test_compare__refuses_other_seeds(random):
    drawn = answers(random, 3, 50)
    with pytest.raises(ValueError, match="the same seeds and images"):
        compare({"a": drawn["a"], "b": drawn["b"][:2]}, {"b": "a"})


# ---- several baselines, folds


def test_compare__each_share_has_a_baseline_of_its_own_and_p_counts_all(random):
    few, many = answers(random, 8, 2000, (0.0, 0.6)), answers(random, 8, 2000, (0.0, 0.0))
    drawn = {
        "ce_tuning-100pct": many["a"],
        "dr_tune-100pct": many["b"],
        "ce_tuning-10pct": few["a"],
        "dr_tune-10pct": few["b"],
    }
    baselines = {"dr_tune-100pct": "ce_tuning-100pct", "dr_tune-10pct": "ce_tuning-10pct"}
    found = compare(drawn, baselines)
    for name, baseline in baselines.items():
        difference = found.differences[name]
        assert difference.baseline == baseline and difference.num_comparisons == 2
        assert difference.mean == pytest.approx(drawn[name].mean() - drawn[baseline].mean())
    assert found.differences["dr_tune-10pct"].verdict == BETTER
    text = conclusion(found)
    assert "DR-Tune at 10 % is better than CE-tuning at 10 % by" in text
    assert "at 100 %" in text.split("; ")[0]
    assert Compared.from_mapping(json.loads(json.dumps(found.to_mapping()))) == found


def test_compare_folds__is_the_corrected_resampled_t_test_after_holm(random):
    base = random.normal(0.8, 0.03, 10)
    of = {
        "ce_tuning": base,
        "dr_tune": base + random.normal(0.05, 0.01, 10),
        "bss": base + random.normal(0.0, 0.01, 10),
    }
    found = compare_folds(of, "ce_tuning", 640, 200)
    p, low, high = corrected_resampled_t_test(of["dr_tune"] - base, 640, 200, 1 / 200)
    better, other = found.differences["dr_tune"], found.differences["bss"]
    assert (better.p, better.interval) == (2 * p, Interval(low, high, FOLDS))
    assert (better.verdict, other.verdict) == (BETTER, UNDECIDED)
    assert found.scores["bss"].accuracies == tuple(of["bss"])
    assert (found.num_seeds, found.num_images, found.is_folds) == (10, 200, True)
    assert "DR-Tune is better than CE-tuning by" in conclusion(found)
    assert "further repeats only a little" in sentence("bss", found)
    assert Compared.from_mapping(json.loads(json.dumps(found.to_mapping()))) == found


def test_compare_folds__the_same_accuracies_are_no_difference():
    found = compare_folds({"ce_tuning": [0.5, 0.6], "twin": [0.5, 0.6]}, "ce_tuning", 8, 2)
    assert sentence("twin", found).endswith("no difference, the same accuracy in every fold")


def test_compare_folds__two_folds_that_are_equal_by_chance_decide_nothing():
    found = compare_folds({"ce_tuning": [0.75, 0.78], "new": [0.83, 0.86]}, "ce_tuning", 21, 36)
    difference = found.differences["new"]
    assert difference.verdict == UNDECIDED
    assert difference.interval.low < 0 < difference.interval.high
    assert found.scores["new"].interval.high == 1.0
