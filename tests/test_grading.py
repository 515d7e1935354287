"""Graders: the answer in a text; math-verify, real and planted, in its process."""

import json
import re
import threading
import time

import numpy as np
import pytest

from e3jax import config
from e3jax.errors import UserError
from e3jax.evaluate import grading

VALUE = config.Evaluate(grader="math_verify")
PLANTED = """
import os, time

print("noise")

class LatexExtractionConfig:
    def __init__(self, **_):
        pass

def parse(text, *_, **__):
    print("noise")
    return text

def verify(gold, answer, **_):
    if "for ever" in answer:
        time.sleep(1000)
    if "dead" in answer:
        os.abort()
    return gold.replace("0", "") == answer
"""


def grade(pairs, spec=VALUE):
    with grading.open_grader(spec) as of:
        return [of(text, gold) for text, gold in pairs]


# ---------------------------------------------------------------- what a text says


def test_thousands_are_written_with_a_comma_or_without():
    """14 of GSM8K's 1,319 answers have one; what is no thousand keeps its comma."""
    pattern = re.compile(r"(?:####|is) (\S+)")
    gold = grading.last_match(pattern, "so 1,450 * 1,000\n#### 1,450,000")
    assert gold == grading.last_match(pattern, "Then it is 7, no, it is 1450000.") == "1450000"
    assert [grading.plain(x) for x in (" 1,2 ", "12,34", "1,2345", "0.5.")] == [
        "1,2", "12,34", "1,2345", "0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{4}, no, \boxed{5", "4"),  # cut at the limit
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\\boxed {7}", "7"),
        (r"\boxed{\left\{ 1, 2 \right.}", r"\left\{ 1, 2 \right."),
        (r"{{ \boxed{ 3 } }}}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        ("the answer is 5", None),
    ],
)
def test_last_boxed(text, found):
    assert grading.last_boxed(text) == found


def test_what_is_boxed_is_had_whole():
    """Any balanced text, whatever stands before and after it."""
    rng = np.random.default_rng(0)

    def balanced(depth):
        parts = [
            str(rng.choice(["x", r"\{", r"\}", r"\frac", "1 ", "\\\\", "$"])) for _ in range(3)
        ]
        return "".join(f"{part}{{{balanced(depth - 1)}}}" if depth else part for part in parts)

    for _ in range(50):
        inner = balanced(int(rng.integers(4))).strip()
        around = [str(rng.choice(["} ", "{ ", "$$", r"\}", r"\boxed{1}", ""])) for _ in range(2)]
        assert grading.last_boxed(f"{around[0]}\\boxed{{{inner}}}") == inner
        assert grading.last_boxed(rf"{around[0]}\boxed{{{inner}}} so {{{around[1]}").strip() in (
            inner,
            "1",
        )


@pytest.mark.parametrize("part", ["\\", "\\boxed{", "{", "\\boxed ", "\\boxed{}"])
def test_text_that_repeats_itself_takes_no_time(part):
    begun = time.monotonic()
    grading.last_boxed(part * 100_000)
    assert time.monotonic() - begun < 5


# ---------------------------------------------------------------- the process


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """A module of math-verify's name for the process."""

    def write(text):
        (tmp_path / "math_verify.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return write


def test_what_is_missing_is_named(plant):
    plant("raise ImportError('no antlr4 here')")
    message = r"evaluate\.grader=math_verify: .*no antlr4 here.*pip install \"math-verify"
    grading._version.cache_clear()
    with pytest.raises(UserError, match=message):
        grading.facts(VALUE)
    assert grading.facts(config.Evaluate()) == {}


def test_a_comparison_without_an_end_is_wrong_and_the_next_is_made(plant, monkeypatch, caplog):
    monkeypatch.setattr(grading, "LIMIT_S", 1)
    plant(PLANTED)
    texts = [r"\boxed{1}", r"\boxed{for ever}", r"\boxed{dead}", r"\boxed{for ever}", r"\boxed{1}"]
    begun = time.monotonic()
    found = grade([(text, "10") for text in texts])
    assert time.monotonic() - begun < 30
    # The planted one ignores zeros.
    assert [x.correct for x in found] == [True, False, False, False, True]
    assert "2 different answers that math-verify could not compare" in caplog.text


def test_answers_reach_the_judge_as_they_are(plant):
    """Whatever is in them: line ends, no UTF-8, more than a pipe holds."""
    plant("import json\n" + PLANTED.replace('gold.replace("0", "") == answer', "len(answer) % 2"))
    inside = ["a\nb", "\ud800\x00", "x" * 200_001, "x" * 200_000]
    found = grade([(rf"\boxed{{{text}}}", "5") for text in inside])
    assert [x.correct for x in found] == [
        (len(text) + len(r"\boxed{}")) % 2 == 1 for text in inside
    ]


def test_no_process_without_a_box(plant):
    """A text without one is wrong whatever the gold answer."""
    plant(PLANTED.replace('gold.replace("0", "") == answer', "True"))
    for text in ("", "5", "the answer is 5", r"\boxed{5", r"\boxed{}"):
        (found,) = grade([(text, "5")])
        assert not found.correct and found.expected == "5"


# ---------------------------------------------------------------- math-verify


@pytest.fixture(scope="module")
def real():
    """The grader, open."""
    pytest.importorskip("math_verify")
    with grading.open_grader(VALUE) as of:
        yield of


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            r"\frac{1}{2}",
            ["0.5", r"\dfrac12", r"\frac{2}{4}", "x = 1/2"],
            ["2", r"-\frac12", "0.51"],
        ),
        (r"\left(3, \frac{\pi}{2}\right)", [r"(3,\pi/2)"], [r"(\pi/2, 3)", "3"]),
        (r"\text{Evelyn}", [r"\mathrm{Evelyn}", "Evelyn"], [r"\text{Angela}"]),
        ("1,4", ["4, 1", r"\{1, 4\}"], ["1", "1,5"]),
        (r"6 - 5i", ["-5i+6"], ["6+5i"]),
        ("10080", ["10,080", r"10{,}080", "10080.0"], ["1008"]),
        (r"x^2 + 2x + 1", ["(x+1)^2"], ["(x-1)^2"]),
    ],
)
def test_equal_as_mathematics(real, gold, right, wrong):
    found = [real(rf"Thus \boxed{{{x}}}.", gold).correct for x in right + wrong]
    assert found == [True] * len(right) + [False] * len(wrong)


def test_gold_by_its_box_its_pattern_or_whole(real):
    spec = config.Evaluate(grader="math_verify", answer=r"#### (\S+)")
    golds = ["7 of 9.\n#### 18", r"7, so \boxed{18}. The answer is: 18", " 18 "]
    found = grade([(r"\boxed{18.0}", gold) for gold in golds], spec)
    assert [(x.expected, x.correct) for x in found] == [("18", True)] * 3


def test_answers_made_to_last(real, monkeypatch):
    monkeypatch.setattr(grading, "LIMIT_S", 1)
    begun = time.monotonic()
    evil = ["9^{9^{9^{9}}}", "{" * 3000 + "1" + "}" * 3000]
    found = grade([(rf"\boxed{{{answer}}}", r"\frac13") for answer in [*evil, "1/3"]])
    assert [x.correct for x in found] == [False, False, True]
    assert time.monotonic() - begun < 40


def test_in_a_thread(real):
    """math-verify's own limits would raise there."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(grade([(r"\boxed{0.5}", r"\frac12")])))
    thread.start()
    thread.join()
    assert [x.correct for x in found] == [True]


def test_math_500(real, shared):
    """All gold answers are right, written in another way, whole solutions as well; none is right
    that says the negative or another word."""
    lines = (shared / "data" / "math-500" / "test.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    # The file has each answer twice: in the solution's box, and bare at its end.
    golds = [text.rsplit("The answer is: ", 1)[1] for text in solutions]
    assert len(golds) == 500
    other = [re.sub(r"\\frac(?!\w)", r"\\dfrac", rf"\displaystyle {gold}") for gold in golds]
    pairs = [(rf"\boxed{{{text}}}", gold) for text, gold in zip(other, golds, strict=True)]
    assert [x for pair in pairs if not (x := real(*pair)).correct] == []
    assert all(real(text, gold).correct for text, gold in zip(solutions, golds, strict=True))
    assert all(real(text, text).correct for text in solutions)
    wrong = [(r"\boxed{-987654}", gold) for gold in golds]
    wrong += [(r"\boxed{\text{no idea}}", gold) for gold in golds]
    wrong += [(f"{gold}, I think", gold) for gold in golds]  # right, but in no box
    assert not any(real(*pair).correct for pair in wrong)
