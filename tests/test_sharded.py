"""Every operation of a run on four meshes of eight devices against one device, in float32.

What differs is the order of float32 sums, a relative 1e-7 an addition. Tolerances: 1e-4 for losses
and figures, which are sums of a few hundred terms that cancel in part; 2e-4 of the greatest entry
for gradients. Masks drawn, tokens decoded, files written and arrays restored are the same.

Kinds of steps, estimators and the losses of stage 2 take turns on the meshes, since compiling is
all that these tests cost; every mesh has a search, a training step and an evaluation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import config, mesh
from e3jax.distill import distill, losses
from e3jax.evaluate.figures import make_figures
from e3jax.models import decoder
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate
from e3jax.search import gumbel, search
from e3jax.selectors import removal, similarity
from e3jax.selectors.selection import Calibration
from e3jax.training.optim import make_optimizer
from sharded_tiny import BY_NAME, MODELS, close, everywhere, placed
from training_tiny import CFG, random_batch, recipe, set_mesh

KEEP = (0, 2, 3)
FREE = np.zeros(CFG.num_layers, bool)
THETA = np.array([0.3, -0.2, 0.5, 0.0], np.float32)
OPTIONS = {"dtype": jnp.float32, "chunk": 32}
K = 5


def cases(text):
    """Parametrises by lines of `mesh model case`, those of slow tests with a star."""
    values = []
    for line in text.strip().splitlines():
        m, *rest = line.removesuffix("*").split()
        marks = [pytest.mark.slow] if line.endswith("*") else []
        values.append(pytest.param(BY_NAME[m], *rest, id="-".join((m, *rest)), marks=marks))
    names = ("sizes", "name", "case")[: 1 + len(rest)]
    return pytest.mark.parametrize(names, values)


EVERY_MESH = cases("""
1x8x1 odd
1x4x2 odd
2x2x2 odd
1x2x4 even
1x4x2 sparse
""")


def close_gradients(found, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(want), strict=True):
        name, size = jax.tree_util.keystr(path), np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * size + 1e-7, err_msg=name)


def same_as_one_device(compute, check):
    """Runs `compute` on one device (once) and on the mesh: `check(found, want)`."""

    @functools.cache
    def on(sizes, *case):
        with set_mesh(*sizes):
            return jax.device_get(compute(*case))

    return lambda sizes, *case: check(on(sizes, *case), on((1, 1, 1), *case))


# ---------------------------------------------------------------- stage 1


SEARCHES = {
    "mixed": {"estimator": "mixed"},
    "score": {"estimator": "score", "loss": "ce"},
    "straight-through": {"estimator": "straight_through", "masks": "batch", "relaxation": "khot"},
}


def search_step(name, estimator):
    changes = SEARCHES[estimator]
    spec = config.Search(keep=2, steps=10, batch=8, curriculum=0.0, tau=(1.0, 0.5), **changes)
    step = search.make_search_step(MODELS[name], spec, remat="none", **OPTIONS)
    state = mesh.replicate(search.init_state(jnp.asarray(THETA), spec, 0))
    state, metrics = step(state, placed(name), mesh.shard_batch(random_batch(0)))
    return {"gradient": state.opt_state[0].mu * 10, "theta": state.theta}, metrics


def check_search(found, want):
    # The estimators standardise differences of losses, which loses a digit or two.
    close(found, want, rtol=2e-3, atol=2e-4)
    assert np.abs(want[0]["gradient"]).max() > 0.1


search_is_the_same = same_as_one_device(search_step, check_search)


@cases("""
1x2x4 odd mixed *
1x8x1 odd mixed *
1x2x4 odd-norms mixed *
1x2x4 even mixed *
2x2x2 odd score *
1x4x2 even straight-through *
1x2x4 sparse mixed *
""")
def test_search_step(sizes, name, case):
    search_is_the_same(sizes, name, case)


@everywhere
def test_masks_drawn(sizes):
    draw = lambda: gumbel.sample(jax.random.key(0), jnp.asarray(THETA), 2, 64, FREE, FREE).keep
    want = np.asarray(draw())
    with set_mesh(*sizes):
        spread = lambda: jax.sharding.reshard(draw(), mesh.spec(("batch", None)))
        np.testing.assert_array_equal(jax.jit(spread)(), want)
    assert len(np.unique(want, axis=0)) == 6  # all pairs of four layers


# ---------------------------------------------------------------- figures and scores


def scores(name):
    cfg, params, batches = MODELS[name], placed(name), [random_batch(0)]
    figures = make_figures(cfg, cfg, **OPTIONS)
    found = {"figures": dataclasses.asdict(figures(params, params, batches, KEEP))}
    if name == "odd":
        given = Calibration(params, cfg, batches, **OPTIONS)
        found["importance"] = removal.leave_one_out_kl(given)
        found["influence"] = similarity.block_influence(given) + 1  # it is 1 - cosine
    return found


scores_are_the_same = same_as_one_device(scores, close)


@pytest.mark.slow
@EVERY_MESH
def test_held_out_figures_importance_and_influence(sizes, name):
    scores_are_the_same(sizes, name)


# ---------------------------------------------------------------- stage 2


RECIPES = {
    "online": {"weight": "joint", "microbatch": 8},
    "stored": {"teacher": "cache", "top_k": K, "weight": "student", "temperature": 2.0, "ce": 0.1},
    "plain": {"teacher": "none", "weight": "uniform", "ce": 1.0},
}


@functools.cache
def topk(name):
    """(ids, log-probabilities, entropy, log-normaliser) on one device: a cache's row."""
    with set_mesh():
        return jax.device_get(teacher_topk(name))


def teacher_topk(name):
    @jax.jit
    def run(params, batch):
        h = decoder.hidden(params, batch, MODELS[name], dtype=jnp.float32, remat="none")
        return losses.teacher_topk(h, decoder.head(params, MODELS[name]), K, 2.0, 32)

    return run(placed(name), mesh.shard_batch(random_batch(0, rows=16)))


def train_step(name, kind):
    cfg, spec = MODELS[name], recipe(batch=16, **RECIPES[kind])
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    step = distill.make_train_step(
        cfg.take_layers(KEEP), spec, optimizer, teacher_cfg=cfg, dtype=jnp.float32, remat="none"
    )
    state = distill.init_state(placed(name, KEEP), optimizer, 2.0)
    teacher = placed(name) if spec.teacher == "online" else None
    stored = mesh.shard_batch(losses.TopK(*topk(name)[:3])) if spec.teacher == "cache" else None
    wanted = jax.tree.map(lambda s: s.sharding.spec, decoder.abstract_params(cfg))
    state, metrics = step(state, teacher, mesh.shard_batch(random_batch(0, rows=16)), stored)
    for tree in (state.params, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        assert jax.tree.map(lambda w: w.sharding.spec, tree) == wanted
    # Adam's first moment is a tenth of the clipped gradient.
    return state.opt_state[1][0].mu, metrics


def check_train(found, want):
    close_gradients(found[0], want[0])
    close(found[1], want[1])
    assert want[1]["loss"] > 0.05


train_is_the_same = same_as_one_device(train_step, check_train)


@cases("""
1x8x1 odd online
1x2x4 odd online *
1x4x2 parallel online *
1x2x4 even online *
1x8x1 even stored *
1x2x4 odd stored *
1x4x2 even plain *
2x2x2 odd plain *
2x2x2 sparse online *
""")
def test_train_step(sizes, name, case):
    train_is_the_same(sizes, name, case)


@everywhere
def test_teacher_topk(sizes):
    want = topk("odd")
    with set_mesh(*sizes):
        found = jax.device_get(teacher_topk("odd"))
    np.testing.assert_array_equal(found[0], want[0])
    close(found[1:], want[1:], atol=1e-4)


# ---------------------------------------------------------------- decoding


def answers(name):
    generator = make_generator(MODELS[name], dtype=jnp.float32, eos=[7])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, 64, length).tolist() for length in (5, 9, 1, 12, 7, 3, 15, 2)]
    return list(generate(generator, placed(name), prompts, 8, 12))


def check_answers(found, want):
    assert found == want and len({token for answer in want for token in answer}) > 8


answers_are_the_same = same_as_one_device(answers, check_answers)


@cases("""
1x8x1 odd *
1x4x2 odd *
2x2x2 odd *
1x2x4 even *
1x2x4 odd-norms *
1x4x2 parallel *
""")
def test_greedy_answers(sizes, name):
    answers_are_the_same(sizes, name)
