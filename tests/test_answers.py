"""Flips and samples by hand; intervals against their definitions."""

import numpy as np
import pytest

from e3jax.evaluate import answers, intervals


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


def test_standard_error_of_equal_windows_is_that_of_their_mean():
    kl = np.array([0.1, 0.4, 0.2, 0.7])
    mean, error = intervals.mean([(10 * x, 10) for x in kl])
    assert mean == pytest.approx(kl.mean())
    assert error == pytest.approx(kl.std(ddof=1) / 2)


def test_one_window_has_no_error():
    assert intervals.mean([(3.0, 10)]) == (pytest.approx(0.3), None)
