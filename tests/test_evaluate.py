"""Figures against dense formulas in float64, the bookkeeping of exact match, the table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import config, files
from e3jax.data.text import Problem, load_tokenizer
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.evaluate import exact, table
from e3jax.evaluate.figures import make_figures
from e3jax.models import decoder
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate
from training_tiny import CFG, KEEP, dense_params, random_batch, set_mesh

pytestmark = pytest.mark.usefixtures("compiled_fast")

# ---------------------------------------------------------------- figures


def student_params():
    """The dense model, a little lost: it agrees on some tokens and not on others."""
    noise = lambda w: w + 0.01 * jax.random.normal(jax.random.key(w.size), w.shape)
    return jax.tree.map(noise, dense_params())


def log_probabilities(params, batch, cfg):
    h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
    x = np.asarray(decoder.logits(params, h, cfg), np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_definition(dense, student, student_cfg, batches):
    """(perplexity, KL, agreement, tokens), all tokens of all batches put together first."""
    p = np.concatenate([log_probabilities(dense, b, CFG)[b.mask] for b in batches])
    q = np.concatenate([log_probabilities(student, b, student_cfg)[b.mask] for b in batches])
    targets = np.concatenate([b.targets[b.mask] for b in batches])
    nll = -np.take_along_axis(q, targets[:, None], 1).mean()
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    return np.exp(nll), kl, (p.argmax(-1) == q.argmax(-1)).mean(), len(p)


def uneven_batches():
    """Three batches; the means of the batches are not the mean of all."""
    batches = [random_batch(number) for number in range(3)]
    mask = batches[0].mask & (np.arange(8)[:, None] < 1)
    return [batches[0].replace(mask=mask), *batches[1:]]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_figures_are_those_of_the_definition(sizes):
    dense, student, batches = dense_params(), student_params(), uneven_batches()
    with set_mesh(*sizes):
        places = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(CFG))
        put = lambda params: jax.tree.map(jax.device_put, params, places)
        figures = make_figures(CFG, CFG, dtype=jnp.float32, chunk=24)
        found = figures(put(dense), put(student), iter(batches))
    perplexity, kl, agreement, tokens = by_definition(dense, student, CFG, batches)
    assert 0.1 < agreement < 0.9 and kl > 0.05
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert (found.agreement, found.tokens) == (pytest.approx(agreement, abs=1e-9), tokens)


@pytest.mark.parametrize("k", [3, CFG.vocab_size])
def test_figures_by_what_the_dense_model_said_before(k):
    """Of a few outcomes the KL is a little lower, as less is told apart; of all it is the same."""
    dense, student, batches = dense_params(), student_params(), uneven_batches()

    def said(batch):
        h = decoder.hidden(dense, batch, CFG, dtype=jnp.float32, remat="none")
        ids, logp, entropy, _ = losses.teacher_topk(h, decoder.head(dense, CFG), k, 1.0, 24)
        return losses.TopK(ids, logp, entropy)

    figures = make_figures(CFG, CFG, dtype=jnp.float32, chunk=24)
    found = figures(None, student, ((batch, said(batch)) for batch in batches))
    perplexity, kl, agreement, tokens = by_definition(dense, student, CFG, batches)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert (found.agreement, found.tokens) == (pytest.approx(agreement, abs=1e-9), tokens)
    if k == CFG.vocab_size:
        assert found.kl == pytest.approx(kl, rel=1e-3)
    else:
        assert 0.1 * kl < found.kl < 0.99 * kl


def test_figures_by_mask_are_those_of_the_sliced_model():
    dense, batches = dense_params(), uneven_batches()
    by_mask = make_figures(CFG, CFG, dtype=jnp.float32, chunk=64)(dense, dense, batches, KEEP)
    cut, cut_cfg = decoder.take_layers(dense, CFG, KEEP), CFG.take_layers(KEEP)
    sliced = make_figures(CFG, cut_cfg, dtype=jnp.float32, chunk=64)(dense, cut, batches)
    assert by_mask == sliced and by_mask.kl > 0.05
    expected = by_definition(dense, cut, cut_cfg, batches)
    assert (by_mask.perplexity, by_mask.kl) == pytest.approx(expected[:2], rel=1e-4)


def test_a_model_is_at_no_distance_from_itself():
    dense, batches = dense_params(), uneven_batches()
    figures = make_figures(CFG, CFG, dtype=jnp.float32, chunk=64)
    found = figures(dense, dense, batches)
    assert (found.kl, found.agreement) == (pytest.approx(0, abs=1e-6), 1.0)
    assert figures(dense, dense, batches, range(4)) == found
    nothing = [b.replace(mask=np.zeros_like(b.mask)) for b in batches[:1]]
    assert dataclasses.astuple(figures(dense, dense, nothing)) == (1.0, 0.0, 0.0, 0, ())


# ---------------------------------------------------------------- exact match

EOS = 2


def solve_planted(monkeypatch, problems, texts, *, ended=True, limits=None, **changes):
    """The answers a model with these texts would be given."""
    tokenizer = load_tokenizer(files.bundled("demo/model"))
    prompts = []

    def planted(generator, params, ids, batch, limit, tell):
        prompts.extend(ids)
        (limits if limits is not None else []).append(limit)
        for text in texts:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield [*found, EOS] if ended else found

    monkeypatch.setattr(exact, "generate", planted)
    problems = [Problem((1, 5 + n), f"prompt {n}", a) for n, a in enumerate(problems)]
    spec = config.Evaluate(**{"max_new_tokens": 8, "batch": 4, **changes})
    answers = exact.solve({}, CFG, problems, tokenizer, spec, eos=[EOS], dtype=jnp.float32)
    assert prompts == [p.prompt_ids for p in problems]
    return answers


def test_exact_match_bookkeeping(monkeypatch):
    answers = solve_planted(
        monkeypatch,
        ["5", "12", "7", "5"],
        ["sun = 5 ; answer : 5", "answer : 1", "sun = 7", "answer : 4 ; answer : 5"],
    )
    assert [a.correct for a in answers] == [True, False, False, True]
    assert [a.found for a in answers] == ["5", "1", None, "5"]  # the last match counts
    assert [a.expected for a in answers] == ["5", "12", "7", "5"]
    assert answers[0].text == "sun = 5 ; answer : 5" and answers[0].prompt == "prompt 0"
    assert all(a.ended for a in answers)


def test_an_answer_that_was_cut_off(monkeypatch):
    (answer,) = solve_planted(monkeypatch, ["5"], ["answer : 5 ; sun"], ended=False)
    assert answer.correct and not answer.ended
    (answer,) = solve_planted(monkeypatch, ["5"], [""], ended=False)
    assert (answer.found, answer.correct, answer.ended) == (None, False, False)


def test_gold_answers_may_be_whole_solutions(monkeypatch):
    gold = ["sun = 1 + 2 = 3 ; answer : 3", "answer : 1 ; no ; answer : 3", " 3\n", "answer : 4"]
    answers = solve_planted(monkeypatch, gold, ["answer : 3"] * 4)
    assert [a.expected for a in answers] == ["3", "3", "3", "4"]
    assert [a.correct for a in answers] == [True, True, True, False]


def test_thousands_are_written_with_a_comma_or_without():
    """14 of GSM8K's 1,319 answers have one; what is no thousand keeps its comma."""
    pattern = exact.answer_pattern(r"(?:####|is) (\S+)")
    gold = exact.last_match(pattern, "so 1,450 * 1,000\n#### 1,450,000")
    assert gold == exact.last_match(pattern, "Then it is 7, no, it is 1450000.") == "1450000"
    assert [exact.plain(x) for x in (" 1,2 ", "12,34", "1,2345", "0.5.")] == [
        "1,2", "12,34", "1,2345", "0.5",
    ]  # fmt: skip


def test_answer_pattern_of_the_configuration(monkeypatch):
    answers = solve_planted(monkeypatch, ["9"], ["sun = 5 ; oak = 9"], answer=r"= (\d+)")
    assert answers[0].correct
    for pattern in ("(", "no group", "(two) (groups)"):
        with pytest.raises(UserError, match=r"evaluate\.answer"):
            exact.answer_pattern(pattern)


def test_answers_stay_inside_the_context(monkeypatch):
    limits = []
    solve_planted(monkeypatch, ["5"], ["answer : 5"], max_new_tokens=1000, limits=limits)
    assert limits == [CFG.max_position - 2]


def test_a_real_model_is_asked(monkeypatch):
    """Without anything planted: solve's text is the model's own greedy continuation."""
    cfg = dataclasses.replace(CFG, vocab_size=96)
    params = decoder.init_params(jax.random.key(0), cfg)
    tokenizer = load_tokenizer(files.bundled("demo/model"))
    ids = tuple(tokenizer("sun = 5 ; sun ?")["input_ids"])
    spec = config.Evaluate(max_new_tokens=5, batch=2, answer="(.*)")
    (answer,) = exact.solve(
        params, cfg, [Problem(ids, "p", "5")], tokenizer, spec, eos=[], dtype=jnp.float32
    )
    generator = make_generator(cfg, dtype=jnp.float32, eos=[])
    (expected,) = generate(generator, params, [ids], 1, 5)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert not answer.ended


# ---------------------------------------------------------------- the table


def row(model, **changes):
    fields = {"layers": 4, "parameters": 1_500_000, "perplexity": 1.25, "kl": 0.5}
    fields |= {"agreement": 0.75, "exact_match": 0.975, "problems": 40, "tokens": 2_000_000}
    return table.Row(model=model, **{**fields, **changes})


def test_table_is_aligned():
    text = table.render([row("dense"), row("shortgpt recovered", exact_match=None, kl=12.0)])
    header, rule, *lines = text.splitlines()
    assert set(rule) == {"-"} and len(rule) == len(header) == len(lines[0]) == len(lines[1])
    for name, values in {"exact match": ("97.5 %", "-"), "KL": ("0.5000", "12.0000")}.items():
        end = header.index(name) + len(name)
        assert [line[:end].split("  ")[-1].strip() for line in lines] == list(values)
    assert [line.split("  ")[0] for line in lines] == ["dense", "shortgpt recovered"]
    assert lines[0].split()[1:4] == ["4", "1.5", "M"]


def test_table_on_disk(tmp_path):
    rows = [row("dense"), row("e3 raw", exact_match=None)]
    table.write(tmp_path, rows)
    kept = files.read_json(tmp_path / "results.json")
    assert [table.Row(**fields) for fields in kept] == rows
    assert (tmp_path / "results.txt").read_text() == table.render(rows) + "\n"
