"""Exact match and pass@1: what is asked, what is kept of it, and going on after a kill."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from e3jax import config, files
from e3jax.data.text import Problem, load_tokenizer
from e3jax.evaluate import exact
from e3jax.models import decoder
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate
from training_tiny import CFG

EOS = 2
TINY = dataclasses.replace(CFG, vocab_size=96)


@pytest.fixture
def tokenizer():
    return load_tokenizer(files.bundled("demo/model"))


@pytest.fixture
def planted(tmp_path, monkeypatch, tokenizer):
    """The lines of a model with these texts, in the queue's order; problems are gold answers."""

    def solve(problems, texts, *, ended=True, **changes):
        def said(generator, params, requests, batch, tell):
            assert [r.prompt for r in requests] == [(1, 5 + n) for n in range(len(problems))]
            for number, text in reversed(list(enumerate(texts))):  # as they are done
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                yield number, [*ids, EOS] if ended else ids

        monkeypatch.setattr(exact, "serve", said)
        asked = [Problem((1, 5 + n), f"prompt {n}", a) for n, a in enumerate(problems)]
        spec = config.Evaluate(**{"max_new_tokens": 8, "batch": 4, **changes})
        path = tmp_path / "answers.jsonl"
        path.unlink(missing_ok=True)
        right = exact.solve(
            {}, CFG, asked, tokenizer, spec, eos=[EOS], dtype=jnp.float32, path=path, inputs={}
        )
        lines = list(files.read_lines(path))
        assert right == [line["correct"] for line in lines]
        assert [line["problem"] for line in lines] == list(range(1, len(problems) + 1))
        return lines

    return solve


def test_bookkeeping(planted):
    lines = planted(
        ["5", "12", "7", "5"],
        ["sun = 5 ; answer : 5", "answer : 1", "sun = 7", "answer : 4 ; answer : 5"],
    )
    assert [a["correct"] for a in lines] == [True, False, False, True]
    assert [a["found"] for a in lines] == ["5", "1", None, "5"]  # the last match counts
    assert [a["expected"] for a in lines] == ["5", "12", "7", "5"]
    assert lines[0]["text"] == "sun = 5 ; answer : 5" and lines[0]["prompt"] == "prompt 0"
    assert all(a["ended"] and a["sample"] == 1 for a in lines)
    assert lines[1]["tokens"] == 4  # answer, :, 1 and the end


def test_an_answer_that_was_cut_off(planted):
    (line,) = planted(["5"], ["answer : 5 ; sun"], ended=False)
    assert line["correct"] and not line["ended"]
    (line,) = planted(["5"], [""], ended=False)
    assert (line["found"], line["correct"], line["ended"], line["tokens"]) == (
        None,
        False,
        False,
        0,
    )


def test_gold_answers_may_be_whole_solutions(planted):
    gold = ["sun = 1 + 2 = 3 ; answer : 3", "answer : 1 ; no ; answer : 3", " 3\n", "answer : 4"]
    lines = planted(gold, ["answer : 3"] * 4)
    assert [a["expected"] for a in lines] == ["3", "3", "3", "4"]
    assert [a["correct"] for a in lines] == [True, True, True, False]


def test_answer_pattern_of_the_configuration(planted):
    (line,) = planted(["9"], ["sun = 5 ; oak = 9"], answer=r"= (\d+)")
    assert line["correct"]


# ---------------------------------------------------------------- a real model


GENERATOR = make_generator(TINY, dtype=jnp.float32, eos=[])  # compiled once for all tests
PROMPTS = ("sun = 5 ; sun ?", "oak = 3 ; sun = oak + 4 ; sun ?", "sun = 7 ; sun ?")


@pytest.fixture
def ask(tmp_path, monkeypatch, tokenizer):
    """Asks a random model the problems; -> its lines, and how many requests that took."""
    params = decoder.init_params(jax.random.key(0), TINY)
    asked = [Problem(tuple(tokenizer(text)["input_ids"]), text, "5") for text in PROMPTS]
    serve = exact.serve
    monkeypatch.setattr(exact, "make_generator", lambda *_, **__: GENERATOR)

    def ask(path="answers.jsonl", *, inputs=None, killed_after=None, **changes):
        count = 0

        def counted(*arguments, **options):
            nonlocal count
            for answer in serve(*arguments, **options):
                if count == killed_after:
                    raise KeyboardInterrupt
                count += 1
                yield answer

        monkeypatch.setattr(exact, "serve", counted)
        spec = config.Evaluate(**{"max_new_tokens": 5, "batch": 2, "answer": "(.*)", **changes})
        exact.solve(
            params,
            TINY,
            asked,
            tokenizer,
            spec,
            eos=[],
            dtype=jnp.float32,
            path=tmp_path / path,
            inputs=inputs or {"keep": [0]},
        )
        return list(files.read_lines(tmp_path / path)), count

    ask.params, ask.problems = params, asked
    return ask


def greedy(ask, tokenizer):
    prompts = [problem.prompt_ids for problem in ask.problems]
    found = generate(GENERATOR, ask.params, prompts, 1, 5)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def test_text_is_the_models_own_greedy_one(ask, tokenizer):
    lines, _ = ask()
    assert [line["text"] for line in lines] == greedy(ask, tokenizer)
    assert all(line["tokens"] == 5 and not line["ended"] for line in lines)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_where_one_token_is_left_a_draw_is_greedy(ask, tokenizer, narrow):
    lines, _ = ask(temperature=5.0, samples=2, **narrow)
    assert [line["text"] for line in lines] == [
        text for text in greedy(ask, tokenizer) for _ in "ab"
    ]


def test_draws_are_different_ones(ask):
    hot = {"temperature": 2.0, "samples": 4}
    lines, count = ask(**hot)
    assert count == 12 and len({line["text"] for line in lines}) > 10
    assert [(x["problem"], x["sample"]) for x in lines] == [
        (p, s) for p in (1, 2, 3) for s in (1, 2, 3, 4)
    ]
    other, _ = ask("other.jsonl", seed=1, **hot)
    assert not {line["text"] for line in lines} & {line["text"] for line in other}


def test_answers_stay_inside_the_context(ask):
    """Each as long as its own prompt allows."""
    lines, _ = ask(max_new_tokens=1000)
    lengths = [len(problem.prompt_ids) for problem in ask.problems]
    assert [line["tokens"] for line in lines] == [TINY.max_position - n for n in lengths]


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 1.0, "samples": 3}], ids=["greedy", "drawn"]
)
def test_killed_it_goes_on_to_the_same_file(ask, tmp_path, changes):
    whole, count = ask("whole.jsonl", **changes)
    with pytest.raises(KeyboardInterrupt):
        ask(killed_after=2, **changes)
    path = tmp_path / "answers.jsonl"
    assert len(path.read_text().splitlines()) == 2 and "correct" not in path.read_text()
    with open(path, "a") as file:
        file.write(json.dumps(whole[-1])[:-9])  # a line that the kill has torn
    assert ask(**changes) == (whole, count - 2)
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert ask(**changes) == (whole, 0)


def test_only_what_decides_an_answer_has_it_given_again(ask):
    drawn = {"temperature": 1.0, "samples": 2}
    first, _ = ask(**drawn)
    again, count = ask(**drawn, answer=r"= (\d+)", batch=4)
    assert count == 0 and [x["text"] for x in again] == [x["text"] for x in first]
    assert [x["found"] for x in again] != [x["found"] for x in first]
    more, count = ask(**drawn | {"samples": 3})
    assert count == 3 and [x for x in more if x["sample"] < 3] == first
    for change in ({"temperature": 1.1}, {"top_p": 0.9}, {"seed": 1}, {"inputs": {"keep": [1]}}):
        assert ask(**drawn | change)[1] == 6
