"""Figures against dense formulas in float64, the table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import files
from e3jax.distill import losses
from e3jax.evaluate import table
from e3jax.evaluate.figures import make_figures
from e3jax.models import decoder
from training_tiny import CFG, KEEP, dense_params, random_batch, set_mesh

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


@pytest.mark.slow
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


def test_table_says_how_sure_pass_at_1_is():
    rows = [row("dense", samples=4, interval=[0.95, 0.99]), row("e3 raw", samples=4)]
    header, _, *lines = table.render(rows).splitlines()
    assert "pass@1" in header and "exact match" not in header
    assert "97.5 % (95.0 to 99.0)" in lines[0] and "97.5 %  " in lines[1]
    assert "pass@1 97.5 % (95.0 to 99.0)" in table.summary(rows[0])


def test_table_on_disk(tmp_path):
    rows = [row("dense"), row("e3 raw", exact_match=None)]
    table.write(tmp_path, rows)
    kept = files.read_json(tmp_path / "results.json")
    assert [table.Row(**fields) for fields in kept] == rows
    assert (tmp_path / "results.txt").read_text() == table.render(rows) + "\n"


def test_a_borrowed_row_takes_the_place_of_an_older_one(tmp_path):
    """All of it: answers of other settings beside a new row would be counted as its own."""
    kinds = "json", "answers.jsonl", "windows.json"
    lender, out = (tmp_path / name / "evaluate" for name in ("lender", "out"))
    for folder, said in ((lender, "new"), (out, "old")):
        for kind in kinds:
            files.write_text(table.beside(folder, "dense", kind), said)
    table.beside(out, "dense", "json").unlink()  # killed while it was measured
    table.beside(out, "dense", "tasks.json").write_text("old")
    table.borrow(out.parent, lender.parent, row("dense"))
    assert {path.read_text() for path in out.iterdir()} == {"new"}
    assert len(list(out.iterdir())) == len(kinds)
    table.beside(out, "dense", "windows.json").write_text("kept")
    table.borrow(out.parent, lender.parent, row("dense"))  # it has that row
    assert table.beside(out, "dense", "windows.json").read_text() == "kept"
