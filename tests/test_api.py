"""e3jax from Python: what importing costs, the stages on arrays, and what is refused."""

import dataclasses
import functools
import inspect
import logging
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import e3jax
from e3jax import configure, outputs, pipeline
from e3jax.hf.export import export_new
from e3jax.models import decoder
from training_tiny import CFG, assert_bitwise, dense_params, set_mesh

ROOT = pathlib.Path(__file__).parent.parent
EXACT = {"model": {"dtype": "float32", "remat": "none"}, "seed": 3}
# What compiles fastest.
SEARCH = {"steps": 2, "batch": 4, "init": "random", "estimator": "score", "score_windows": 4}


def test_importing_is_cheap_until_a_name_is_used():
    program = """
import sys, e3jax
from e3jax import cli
assert "jax" not in sys.modules and "numpy" not in sys.modules
assert set(e3jax.__all__) <= set(dir(e3jax))
assert not hasattr(e3jax, "nothing")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    for name in e3jax.__all__:
        found = getattr(e3jax, name)
        assert found.__doc__ and not inspect.ismodule(found)  # no package of that name hides it


# ---------------------------------------------------------------- prune


def configuration(monkeypatch, *arguments, **settings):
    """What `prune` runs."""

    class Stop(Exception):
        pass

    def execute(command, run):
        assert command == "run"
        raise Stop(run)

    monkeypatch.setattr(pipeline, "execute", execute)
    with pytest.raises(Stop) as stopped:
        e3jax.prune(*arguments, **settings)
    return stopped.value.args[0]


def test_prune_runs_what_the_command_line_would(monkeypatch, tmp_path):
    found = configuration(
        monkeypatch,
        "demo",
        config="demo",
        keep=0.5,
        data={"train": "demo/train.jsonl.gz", "measure": [{"path": "x.jsonl", "rows": ["0:5"]}]},
        out=tmp_path,
        search={"steps": 7},
        distill={"optimizer": {"lr": 0.5}},
        **{"evaluate.rows": 9},
    )
    overrides = [
        "model.path=demo", "search.keep=0.5", "data.train=[{path: demo/train.jsonl.gz}]",
        "data.measure=[{path: x.jsonl, rows: ['0:5']}]", f"out={tmp_path}", "search.steps=7",
        "distill.optimizer.lr=0.5", "evaluate.rows=9",
    ]  # fmt: skip
    assert found == configure.load_run("demo", overrides)


def test_one_path_is_parted(monkeypatch):
    data = configuration(monkeypatch, "demo", data=pathlib.Path("a.jsonl"), out="x").data
    rows = list(range(1000))
    parts = [data.train, data.measure, data.held_out]
    assert {source.path for (source,) in parts} == {"a.jsonl"}
    cuts = [slice(*(int(x) if x else None for x in s.rows[0].split(":"))) for (s,) in parts]
    assert [row for cut in cuts for row in rows[cut]] == rows
    assert [len(rows[cut]) for cut in cuts] == [600, 200, 200]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "out: required"),
        ({"out": "x", "serch": {"steps": 3}}, "serch: unknown key; did you mean search"),
        ({"out": "x", "search.steps": 0}, "search.steps"),
        ({"out": "x", "config": "nowhere.yaml"}, "nowhere.yaml: cannot read"),
    ],
)
def test_bad_settings(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(e3jax.UserError, match=message):
        e3jax.prune("demo", **settings)
    assert not list(tmp_path.iterdir())
    assert logging.getLogger("e3jax").handlers == []


# ---------------------------------------------------------------- stages on arrays

TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (8, 16))
HELD_OUT = np.random.default_rng(1).integers(0, CFG.vocab_size, (4, 16))


@functools.partial(jax.jit, static_argnums=1)
def log_probabilities(params, cfg, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = decoder.Batch(tokens, positions, jnp.ones_like(tokens), tokens, tokens >= 0)
    h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
    return jax.nn.log_softmax(decoder.logits(params, h, cfg)[:, :-1])


def kl(tokens, params, others, other_cfg):
    """KL of the dense model to another by their logits, nats a prediction."""
    p, q = log_probabilities(params, CFG, tokens), log_probabilities(others, other_cfg, tokens)
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))


def without(params, layer):
    keep = [i for i in range(CFG.num_layers) if i != layer]
    return e3jax.take_layers(params, CFG, keep), CFG.take_layers(keep)


def test_importance_is_the_kl_without_a_layer():
    params = dense_params()
    found = e3jax.importance(params, CFG, TOKENS, **EXACT)
    wanted = [kl(TOKENS, params, *without(params, layer)) for layer in range(CFG.num_layers)]
    assert min(wanted) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


@pytest.mark.slow
def test_search_and_recovery():
    params = dense_params()
    before = jax.tree.map(np.array, params)
    mask = e3jax.search_mask(params, CFG, TOKENS, HELD_OUT, keep=3, search=SEARCH, **EXACT)
    assert list(mask.keep) == sorted(np.argsort(mask.theta)[-3:])
    assert mask.checkpoint is None  # of arrays nobody knows it
    small = CFG.take_layers(mask.keep)
    raw = kl(HELD_OUT, params, e3jax.take_layers(params, CFG, mask.keep), small)
    assert mask.kl == pytest.approx(raw, rel=1e-3)

    recipe = {"steps": 30, "batch": 8, "optimizer": {"lr": 3e-3}, "weight": "uniform"}
    student = e3jax.recover(params, CFG, mask, TOKENS, HELD_OUT, distill=recipe, **EXACT)
    assert {x.dtype for x in jax.tree.leaves(student)} == {jnp.dtype("float32")}
    trained, untrained = (
        kl(TOKENS, params, w, small) for w in (student, e3jax.take_layers(params, CFG, mask.keep))
    )
    assert trained < 0.7 * untrained
    assert_bitwise(params, before)


def test_export(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "is_torch_available", lambda: False)  # test_pipeline.py has it
    tokenizer = ROOT / "e3jax" / "demo" / "model"
    dense, out = tmp_path / "dense", tmp_path / "out"
    cfg = dataclasses.replace(CFG, vocab_size=72)
    export_new(dense_params(cfg), cfg, tokenizer, dense, card="", eos=2, pad=0)
    loaded = e3jax.load(str(dense))
    assert loaded.cfg == cfg and loaded.tokenizer.vocab_size == 71
    pruned = e3jax.take_layers(loaded.params, cfg, [0, 3])
    with pytest.raises(e3jax.UserError, match=r"params are not those of layers \[0, 1, 3\]"):
        e3jax.export(pruned, [0, 1, 3], str(dense), out, TOKENS)
    assert not out.exists()
    assert e3jax.export(pruned, [0, 3], str(dense), out, TOKENS, recovered=False) == out
    assert_bitwise(e3jax.load(str(out)).params, pruned)
    assert "not trained since" in (out / "README.md").read_text()
    with pytest.raises(e3jax.UserError, match="not empty"):
        e3jax.export(pruned, [0, 3], str(dense), out, TOKENS)


def test_recovery_without_a_step_is_the_slice():
    params = dense_params()
    given = {"distill": {"steps": 0, "batch": 8, "weight": "uniform"}}
    student = e3jax.recover(params, CFG, [0, 2], TOKENS, HELD_OUT, **given, **EXACT)
    assert_bitwise(student, e3jax.take_layers(params, CFG, [0, 2]))


def test_devices_share_the_batches_of_a_stage_and_no_others():
    params = dense_params()
    with set_mesh(1, 2, 1):
        given = {"distill": {"steps": 0, "batch": 8, "weight": "uniform"}, "search": {"batch": 3}}
        student = e3jax.recover(params, CFG, [0, 2], TOKENS, HELD_OUT, **given, **EXACT)
        assert_bitwise(student, e3jax.take_layers(params, CFG, [0, 2]))
        assert len(e3jax.importance(params, CFG, TOKENS, **given, **EXACT)) == CFG.num_layers
        with pytest.raises(e3jax.UserError, match=r"search\.batch=3"):
            e3jax.search_mask(params, CFG, TOKENS, HELD_OUT, keep=3, **given, **EXACT)
        with pytest.raises(e3jax.UserError, match=r"distill\.batch=3"):
            e3jax.recover(params, CFG, [0, 2], TOKENS, HELD_OUT, distill={"batch": 3}, **EXACT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: e3jax.recover(w, CFG, [2, 1], TOKENS, HELD_OUT), "ascending numbers"),
        (lambda w: e3jax.search_mask(w, CFG, TOKENS + 60, HELD_OUT), "token ids from 60"),
        (lambda w: e3jax.search_mask(w, CFG, TOKENS, HELD_OUT, keep=4), "search.keep=4"),
        (lambda w: e3jax.search_mask(w, CFG, TOKENS[0], HELD_OUT), "expected integers"),
        (lambda w: e3jax.search_mask(w, CFG, np.tile(TOKENS, 9), HELD_OUT), "context is 64"),
        (lambda w: e3jax.importance(w, CFG, TOKENS, by="luck"), "kl, shortgpt"),
        (lambda w: e3jax.load("no/where/at/all"), "no/where/at/all"),
    ],
)
def test_bad_arrays(call, message):
    with pytest.raises(e3jax.UserError, match=message):
        call(dense_params())


def test_windows_of_arrays_are_those_that_were_stored(tmp_path):
    rows = {"path": "demo/train.jsonl.gz", "rows": ["0:30"]}
    settings = {"window": 64, "loss_on": "completion", "cache": str(tmp_path)}
    stored = e3jax.tokenize("demo", rows, **settings)
    again = e3jax.windows(stored.tokens, stored.segments, stored.loss)
    assert again.fingerprint == stored.fingerprint
    assert all(x.dtype == np.int32 for x in (again.tokens, again.segments))
    plain = e3jax.windows(stored.tokens)
    assert plain.fingerprint != stored.fingerprint and plain.loss.all()
    with pytest.raises(e3jax.UserError, match="segments: shape"):
        e3jax.windows(stored.tokens, stored.segments[:1])
