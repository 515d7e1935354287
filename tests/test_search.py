"""The search step against sliced models and multiplied gates; meshes; schedules; validation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from e3jax import config, configure, mesh
from e3jax.errors import UserError
from e3jax.models import decoder, rope
from e3jax.models.attention import attend, causal_mask
from e3jax.search import gumbel, prefix, search
from training_tiny import CFG, dense_params, random_batch, set_mesh

L, ROWS = CFG.num_layers, 8
FREE = np.zeros(L, bool)
THETA = np.array([0.3, -0.2, 0.5, 0.0], np.float32)


def make_spec(**changes) -> config.Search:
    fields = {
        "keep": 2,
        "estimator": "score",
        "steps": 10,
        "batch": ROWS,
        "curriculum": 0.0,
        "tau": (1.0, 0.5),
    }
    return config.Search(**{**fields, **changes})


@functools.cache
def make_step(spec: config.Search, remat: str = "layer"):
    return search.make_search_step(CFG, spec, dtype=jnp.float32, remat=remat, chunk=32)


params_once = functools.cache(dense_params)


def take(spec, steps=1, params=None, seed=0, theta=THETA):
    """(state, metrics of the last step) after some steps from theta."""
    params = params_once() if params is None else params
    if mesh.current() is not None:
        table = decoder.abstract_params(CFG)
        params = jax.tree.map(lambda w, like: jax.device_put(w, like.sharding), params, table)
    state = mesh.replicate(search.init_state(theta, spec, seed))
    for number in range(steps):
        state, metrics = make_step(spec)(state, params, mesh.shard_batch(random_batch(number)))
    return jax.device_get(state), {k: float(v) for k, v in metrics.items()}


def first_draw(spec, seed=0, theta=THETA, rows=ROWS):
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return gumbel.sample(key, theta, spec.keep, rows, FREE, FREE)


def first_gradient(state):
    """What Adam saw: after a step its first moment is a tenth of the gradient."""
    return np.asarray(state.opt_state[0].mu) * 10


def row_losses(params, batch, keep_bl, kind):
    """Sum over each row's loss tokens of KL to the dense model (or of -log p), by sliced models."""

    @functools.partial(jax.jit, static_argnames="cfg")
    def run(params, cfg):
        h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
        return jax.nn.log_softmax(decoder.logits(params, h, cfg))

    def log_probs(kept):
        cut = decoder.take_layers(params, CFG, kept)
        return np.asarray(run(cut, CFG.take_layers(kept)), np.float64)

    dense, sums = log_probs(range(L)), np.zeros(ROWS)
    sliced = {kept: log_probs(kept) for kept in {tuple(np.flatnonzero(k)) for k in keep_bl}}
    for b, keep in enumerate(keep_bl):
        logq = sliced[tuple(np.flatnonzero(keep))][b]
        kl = np.sum(np.exp(dense[b]) * (dense[b] - logq), -1)
        nll = -logq[np.arange(len(logq)), batch.targets[b]]
        sums[b] = np.sum((kl if kind == "kl" else nll)[batch.mask[b]])
    return sums


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_score_step_is_the_log_loss_of_sliced_models(kind):
    spec, batch, params = make_spec(loss=kind), random_batch(0), params_once()
    draw, tokens = first_draw(spec), batch.mask.sum(1)
    sums = row_losses(params, batch, np.asarray(draw.keep), kind)
    log = np.log(sums / tokens)
    centred = np.array([log[b] - np.delete(log, b).mean() for b in range(ROWS)])
    advantage = jnp.asarray(centred / log.std(), jnp.float32)
    want = jax.grad(lambda t: jnp.mean(advantage * gumbel.log_prob(t, draw)))(THETA)

    state, metrics = take(spec)
    np.testing.assert_allclose(metrics["loss"], sums.sum() / tokens.sum(), rtol=1e-5)
    np.testing.assert_allclose(first_gradient(state), want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(want), rtol=1e-3)
    assert metrics["kept"] == 2 and metrics["tau"] == 1
    assert metrics["tokens"] == state.tokens == np.sum(batch.segments > 0)
    # Adam's first step: the learning rate against the sign.
    np.testing.assert_allclose(state.theta, THETA - spec.lr * np.sign(want), rtol=1e-4)


def multiplied(params, batch, m_bl):
    """Hidden states with h + m (Layer(h) - h) written out, no custom derivative."""
    angles = rope.angles(batch.positions, CFG.rope, CFG.head_dim)
    mask = causal_mask(batch.segments, None)
    see = lambda q, k, v: attend(q, k, v, mask)

    def body(h, xs):
        w, m_b = xs
        y = decoder.layer(w, h, angles, see, CFG)
        return h + m_b[:, None, None] * (y - h), None

    h, _ = jax.lax.scan(body, params["embed"][batch.tokens], (params["layers"], m_bl.T))
    return decoder.rms_norm(h, params["final_norm"], CFG.norm_eps)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [1, 3])
def test_the_dense_model_may_start_at_a_layer_of_each_row(masks, monkeypatch):
    spec = make_spec(estimator="mixed", masks_per_window=masks)
    want, want_metrics = take(spec)
    monkeypatch.setattr(prefix, "PART_TOKENS", 1)
    make_step.cache_clear()
    found, metrics = take(spec)
    make_step.cache_clear()
    np.testing.assert_allclose(first_gradient(found), first_gradient(want), rtol=1e-4, atol=1e-5)
    assert metrics == pytest.approx(want_metrics, rel=1e-4)


@pytest.mark.cases(1)
@pytest.mark.parametrize("relaxation,masks", [("threshold", "row"), ("khot", "batch")])
def test_straight_through_step_is_the_gradient_of_multiplied_gates(relaxation, masks):
    """Normalised, the first gradient is a sign; its size is in the running scale."""
    spec = make_spec(estimator="straight_through", relaxation=relaxation, masks=masks)
    batch, params = jax.tree.map(jnp.asarray, random_batch(0)), params_once()

    @jax.jit
    @jax.grad
    def gradient(theta):
        draw = first_draw(spec, theta=theta, rows=ROWS if masks == "row" else 1)
        soft = {"threshold": gumbel.threshold, "khot": gumbel.khot}[relaxation](draw, 1.0)
        m = draw.keep + soft - jax.lax.stop_gradient(soft)
        logp, logq = (
            jax.nn.log_softmax(decoder.logits(params, multiplied(params, batch, gates), CFG))
            for gates in (jnp.ones((ROWS, L)), jnp.broadcast_to(m, (ROWS, L)))
        )
        kl = jnp.sum(jnp.exp(logp) * (logp - logq), -1)
        return jnp.sum(jnp.where(batch.mask, kl, 0)) / jnp.sum(batch.mask)

    want = np.asarray(gradient(THETA))
    state, _ = take(spec)
    np.testing.assert_allclose(state.gate_scale / np.sqrt(0.1), np.abs(want), rtol=1e-3)
    np.testing.assert_allclose(first_gradient(state), np.sign(want), rtol=1e-3)
    assert np.abs(want).min() > 1e-4


def scan_outputs(jaxpr):
    """Shapes that scans of a jaxpr put out, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield from (v.aval.shape for v in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scan_outputs(inner)


def test_no_weight_has_a_gradient():
    """The backward scan of the layers puts out no array of a weight's shape."""
    spec, params, batch = make_spec(estimator="mixed"), params_once(), random_batch(0)
    weights = {w.shape for w in jax.tree.leaves(params["layers"]) if w.ndim > 2}

    def trained(params):
        h = decoder.hidden(params, batch, CFG, dtype=jnp.float32, gates_bl=jnp.ones((ROWS, L)))
        return jnp.sum(h)

    assert weights & set(scan_outputs(jax.make_jaxpr(jax.grad(trained))(params).jaxpr))
    state = search.init_state(THETA, spec, 0)
    step = jax.make_jaxpr(make_step(spec))(state, params, batch)
    assert not weights & set(scan_outputs(step.jaxpr))


@pytest.mark.cases(1)
@pytest.mark.parametrize("masks", [2, 3])
def test_masks_of_a_window_are_compared_with_each_other(masks):
    """Rows of their own, window by window, of which the dense model runs once; the baseline of a
    mask is the other masks of its window."""
    spec, batch, params = make_spec(masks_per_window=masks), random_batch(0), params_once()
    draw, tokens = first_draw(spec, rows=ROWS * masks), batch.mask.sum(1)[:, None]
    keep = np.asarray(draw.keep).reshape(ROWS, masks, L)
    sums = np.stack([row_losses(params, batch, keep[:, j], "kl") for j in range(masks)], axis=1)
    log = np.log(sums / tokens)
    centred = np.stack(
        [log[:, j] - np.delete(log, j, axis=1).mean(axis=1) for j in range(masks)], axis=1
    )
    deviation = np.sqrt(np.mean((log - log.mean(axis=1, keepdims=True)) ** 2))
    advantage = jnp.asarray((centred / deviation).ravel(), jnp.float32)
    want = jax.grad(lambda t: jnp.mean(advantage * gumbel.log_prob(t, draw)))(THETA)

    state, metrics = take(spec)
    np.testing.assert_allclose(metrics["loss"], sums.sum() / tokens.sum() / masks, rtol=1e-5)
    np.testing.assert_allclose(first_gradient(state), want, rtol=1e-3, atol=1e-4)
    assert metrics["tokens"] == state.tokens == masks * np.sum(batch.segments > 0)


@pytest.mark.slow
def test_masks_of_a_window_are_rows_to_straight_through():
    """The step of a batch in which each window stands twice."""
    spec = make_spec(estimator="straight_through", masks_per_window=2)
    found, metrics = take(spec)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), random_batch(0))
    plain = make_spec(estimator="straight_through", batch=2 * ROWS)
    want, want_metrics = make_step(plain)(search.init_state(THETA, plain, 0), params_once(), twice)
    np.testing.assert_allclose(found.gate_scale, want.gate_scale, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.theta, want.theta, rtol=1e-5)
    assert metrics == pytest.approx({k: float(v) for k, v in want_metrics.items()}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator,masks,micro", [("mixed", 1, 1), ("mixed", 3, 4), ("score", 3, 2)]
)
def test_micro_batches_give_the_whole_step(estimator, masks, micro):
    spec = make_spec(estimator=estimator, masks_per_window=masks)
    want, want_metrics = take(spec)
    found, metrics = take(dataclasses.replace(spec, microbatch=micro))
    np.testing.assert_allclose(first_gradient(found), first_gradient(want), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gate_scale, want.gate_scale, rtol=1e-4, atol=1e-7)
    assert metrics == pytest.approx(want_metrics, rel=1e-4)


SPECS = {  # those that test_sharded.py has not
    "one-mask": make_spec(estimator="straight_through", masks="batch", relaxation="khot"),
    "shared": make_spec(estimator="mixed", masks_per_window=2, microbatch=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_eight_devices_give_the_step_of_one(name):
    want, want_metrics = take(SPECS[name])
    with set_mesh(2, 2, 2):
        found, metrics = take(SPECS[name])
    for field in ("theta", "gate_scale", "tokens"):
        x, y = getattr(found, field), getattr(want, field)
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5, err_msg=field)
    np.testing.assert_allclose(first_gradient(found), first_gradient(want), rtol=1e-3, atol=1e-4)
    assert metrics == pytest.approx(want_metrics, rel=1e-3)


def test_the_seed_decides():
    spec = make_spec()
    runs = [take(spec, steps=3, seed=seed)[0].theta for seed in (0, 0, 1)]
    assert runs[0].tobytes() == runs[1].tobytes()
    assert np.any(runs[0] != runs[2])


def test_each_step_draws_anew():
    """The same batch and theta at other steps: other masks, so another loss."""
    spec, batch = make_spec(), random_batch(0)
    states = [search.init_state(THETA, spec, 0).replace(step=jnp.int32(n)) for n in (0, 1, 2, 2)]
    losses = [float(make_step(spec)(state, params_once(), batch)[1]["loss"]) for state in states]
    assert len(set(losses)) == 3 and losses[2] == losses[3]


def planted_params(idle=(1, 2)):
    """Layers that add nothing to the stream: the answer to keeping the others."""
    params = dense_params()
    layers = dict(params["layers"])
    for name in ("o", "down"):
        layers[name] = layers[name].at[np.array(idle)].set(0.0)
    return {**params, "layers": layers}


@pytest.mark.parametrize("estimator", ["score", "mixed"])
def test_finds_planted_idle_layers(estimator):
    """From a start that would remove the others."""
    spec = make_spec(estimator=estimator, steps=40, curriculum=0.3, lr=0.2)
    start = np.array([-0.5, 0.5, 0.5, -0.5])
    state, metrics = take(spec, steps=40, params=planted_params(), theta=start)
    kept = gumbel.answer(state.theta, 2, FREE, FREE)
    assert np.flatnonzero(kept).tolist() == [0, 3]
    assert metrics["kept"] == 2


def test_no_step_compiles_after_the_first_nor_for_another_seed():
    spec = make_spec(estimator="score", steps=40, curriculum=0.3, lr=0.2)
    take(spec, steps=1)
    compiled = make_step(spec)._cache_size()
    first, second = take(spec, steps=4)[0], take(spec, steps=4, seed=1)[0]
    assert make_step(spec)._cache_size() == compiled
    assert np.any(first.drawn != second.drawn)


def test_protected_and_forced_layers_do_not_move():
    spec = make_spec(estimator="mixed", protect=(0,), force=(-1,))
    theta = take(spec, steps=2)[0].theta
    np.testing.assert_array_equal(theta[[0, 3]], THETA[[0, 3]])
    assert np.all(theta[1:3] != THETA[1:3])


# --- where theta starts, how the search anneals


@pytest.mark.parametrize("num_layers,keep", [(24, 18), (64, 48), (5, 1)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_curriculum(num_layers, keep, share):
    ks = [int(gumbel.curriculum(n, 100, share, num_layers, keep)) for n in range(100)]
    assert ks == sorted(ks, reverse=True)
    assert ks[0] == (keep if share == 0 else num_layers - 1) and ks[-1] == keep
    reached = ks.index(keep)
    removed = num_layers - keep
    assert reached <= max(share * 100 - 1, 0) and reached >= share * 100 * (1 - 1 / removed) - 1
    assert set(ks) == set(range(keep, ks[0] + 1))  # no count is skipped


def test_temperature_is_geometric():
    taus = [float(gumbel.temperature(n, 11, (4.0, 0.1))) for n in range(11)]
    np.testing.assert_allclose(taus, np.geomspace(4.0, 0.1, 11), rtol=1e-5)
    assert float(gumbel.temperature(0, 1, (4.0, 0.1))) == 4.0


def test_init_theta():
    s = np.array([6.4506, 0.7557, 0.4530, 0.0013, 0.0020])
    log = gumbel.init_theta(s, "kl", "log", 2.0, seed=0)
    want = np.log(s) - np.log(s).mean()
    np.testing.assert_allclose(log, want / want.std() * 2.0 * np.pi / np.sqrt(6), rtol=1e-5)
    rank = gumbel.init_theta(s, "kl", "rank", 1.0, seed=0)
    np.testing.assert_allclose(np.diff(rank[[3, 4, 2, 1, 0]]), np.pi / np.sqrt(12), rtol=1e-5)
    ties = gumbel.init_theta(np.array([3.0, 1.0, 3.0]), "kl", "rank", 1.0, seed=0)
    assert ties[0] == ties[2] > ties[1]
    random = [gumbel.init_theta(s, "random", "log", 1.0, seed) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(random[0], random[1])
    assert np.any(random[0] != random[2])
    for x in (log, rank, *random):
        assert x.dtype == np.float32 and abs(x.mean()) < 1e-6


@pytest.mark.parametrize("value", [0.3, 0.1, 7.7, 0.0])
@pytest.mark.parametrize("num_layers", [3, 7, 24])
@pytest.mark.parametrize("form", ["log", "rank"])
def test_no_variance_starts_at_zero(value, num_layers, form):
    theta = gumbel.init_theta(np.full(num_layers, value), "kl", form, 2.0, seed=0)
    np.testing.assert_array_equal(theta, np.zeros(num_layers))


@pytest.mark.parametrize(
    "keep,layers,count", [(18, 24, 18), (0.75, 24, 18), (0.5, 5, 2), (1, 2, 1)]
)
def test_resolve_keep(keep, layers, count):
    assert search.resolve_keep(keep, layers) == count


@pytest.mark.parametrize("keep,layers", [(24, 24), (30, 24), (0.99, 4), (0.01, 4), (2.5, 4)])
def test_keep_that_cannot_be(keep, layers):
    with pytest.raises(UserError, match=f"search.keep={keep}: the model has {layers} layers"):
        search.resolve_keep(keep, layers)


def test_fixed_layers():
    protect, force = search.fixed_layers(make_spec(protect=(0, -1), force=(1,)), 4)
    assert np.flatnonzero(protect).tolist() == [0, 3] and np.flatnonzero(force).tolist() == [1]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"protect": (4,)}, r"search.protect: no layer \[4\]; the model has 0 to 3"),
        ({"force": (-5,)}, r"search.force: no layer \[-5\]"),
        ({"protect": (3,), "force": (-1,)}, r"both name layers \[3\]"),
        ({"protect": (0, 1, 2)}, "search.protect names 3 layers and search.keep=2"),
        ({"force": (0, 1, 2)}, "search.force names 3 layers and only 2 are removed"),
    ],
)
def test_fixed_layers_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        search.fixed_layers(make_spec(**changes), 4)


@pytest.mark.parametrize("estimator", ["score", "mixed"])
@pytest.mark.parametrize("changes", [{"masks": "batch"}, {"batch": 1}])
def test_score_function_needs_masks_to_compare(estimator, changes):
    with pytest.raises(pydantic.ValidationError, match="masks=row and batch of 2"):
        make_spec(estimator=estimator, **changes)
    with pytest.raises(UserError, match=f"search: estimator={estimator} compares masks"):
        configure.validate({"out": "x", "search": {"estimator": estimator, **changes}}, "run.yaml")
    make_spec(estimator="straight_through", **changes)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"masks": "batch", "masks_per_window": 2}, "masks_per_window=2 needs masks=row"),
        ({"microbatch": 3}, "microbatch=3 does not divide batch=8"),
    ],
)
def test_batches_that_cannot_be(changes, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        make_spec(estimator="straight_through", **changes)


def test_one_window_with_two_masks_is_enough_to_compare():
    make_spec(batch=1, masks_per_window=2)
