"""Flips and samples by hand; intervals against their definitions."""

import json

import numpy as np
import pytest

from e3jax.evaluate import answers, intervals, rows


def answer(found, expected="5", text=None, prompt="how many?"):
    return {
        "prompt": prompt, "expected": expected, "found": found, "text": text or f"answer : {found}",
        "correct": found == expected,
    }  # fmt: skip


def test_flips():
    dense = list(map(answer, ["5", "5", "5", "4", "4", "4", None]))
    other = list(map(answer, ["5", "5", "1", "5", "3", "4", None]))
    assert answers.flips(dense, other) == answers.Flips(both=2, lost=1, gained=1, another=1, same=2)


def test_samples_show_those_that_differ_first():
    dense = [answer(x, text=f"dense {i}") for i, x in enumerate("55545")]
    other = [answer(x, text=f"other {i}") for i, x in enumerate("55145")]
    text = answers.samples({"dense": dense, "e3": other}, 2)
    assert "dense 2" in text and "other 2" in text and "dense 0" in text
    assert "dense 1" not in text and text.index("dense 0") < text.index("dense 2")
    assert "**e3** (wrong: 1)" in text and "**dense** (right)" in text


def test_of_drawn_answers_the_first_are_read(tmp_path):
    """And none before all are there and graded."""
    figures = {"layers": 1, "parameters": 1, "perplexity": 1.0, "kl": 0.0, "agreement": 1.0}
    row = rows.Row(model="e3 raw", **figures, exact_match=0.5, problems=2, tokens=0, samples=2)
    lines = [
        answer("5", text=f"{p} {s}") | {"problem": p, "sample": s} for p in (1, 2) for s in (1, 2)
    ]
    path = tmp_path / "e3-raw.answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [x["text"] for x in answers.read(tmp_path, row)] == ["1 1", "2 1"]
    del lines[2]["correct"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answers.read(tmp_path, row) == []


def test_an_answer_cannot_end_its_block():
    evil = answer("5", text="```\n# a heading\n````", prompt="``` a")
    text = answers.samples({"dense": [evil]}, 1)
    assert "`````text\n```\n# a heading\n````\n`````" in text and "````text\n``` a\n````" in text


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize(("right", "count"), [(0, 10), (1, 10), (499, 500), (500, 500), (3, 7)])
def test_wilson_is_where_the_score_test_turns(right, count):
    """Its ends are the shares p that lie 1.96 of their own standard errors from what was seen."""
    for end in intervals.wilson(right, count):
        error = np.sqrt(end * (1 - end) / count)
        assert abs(right / count - end) == pytest.approx(intervals.Z_95 * error, abs=1e-9)
        assert 0 <= end <= 1


@pytest.mark.parametrize("right", [[1, 0, 1, 1, 0], [0] * 9, [1] * 500])
def test_of_one_answer_or_of_like_ones_it_is_wilsons(right):
    """Ten answers that are all the same say no more than one."""
    expected = intervals.wilson(sum(right), len(right))
    assert intervals.solved(right, 1) == pytest.approx(expected)
    assert intervals.solved([10 * x for x in right], 10) == pytest.approx(expected)


def test_answers_that_are_independent_all_count():
    """Of problems that are alike the interval is that of all answers, never a narrower one."""
    right = np.random.default_rng(0).binomial(4, 0.6, 2000)
    ends, expected = intervals.solved(right.tolist(), 4), intervals.wilson(right.sum(), 8000)
    assert ends == pytest.approx(expected, abs=2e-3)
    assert intervals.solved([2] * 50, 4) == pytest.approx(intervals.wilson(100, 200))


@pytest.mark.parametrize(
    ("problems", "samples", "beta"), [(500, 4, (2, 1)), (100, 8, (1, 1)), (500, 16, (5, 0.2))]
)
def test_interval_of_pass_at_1(problems, samples, beta):
    """Of problems as hard as drawn from a beta distribution it holds pass@1 in 95 % of all
    evaluations or a little more, and is as wide as a bootstrap over problems."""
    rng = np.random.default_rng(0)
    true, held, widths, resampled = beta[0] / sum(beta), [], [], []
    for number in range(1000):
        right = rng.binomial(samples, rng.beta(*beta, problems))
        low, high = intervals.solved(right.tolist(), samples)
        held.append(low <= true <= high)
        if number < 50:
            means = rng.choice(right / samples, (2000, problems)).mean(axis=1)
            widths.append(high - low)
            resampled.append(np.subtract(*np.quantile(means, (0.975, 0.025))))
    assert 0.93 < np.mean(held) < 0.985
    assert np.mean(widths) == pytest.approx(np.mean(resampled), rel=0.12)


def test_standard_error_of_equal_windows_is_that_of_their_mean():
    kl = np.array([0.1, 0.4, 0.2, 0.7])
    mean, error = intervals.mean([(10 * x, 10) for x in kl])
    assert mean == pytest.approx(kl.mean())
    assert error == pytest.approx(kl.std(ddof=1) / 2)


def test_one_window_has_no_error():
    assert intervals.mean([(3.0, 10)]) == (pytest.approx(0.3), None)
