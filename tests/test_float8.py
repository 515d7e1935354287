"""`distill.float8`: the dense model's products are those of rounded numbers, and its alone."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from e3jax import devices, hopper, mesh
from e3jax.distill import distill
from e3jax.hopper import rows
from e3jax.models import decoder, float8, layer
from e3jax.training.optim import make_optimizer
from sharded_tiny import MODELS, numbers
from training_tiny import random_batch, recipe, set_mesh, written_out

# Activations, matrix, their axes, those of the result.
PRODUCTS = {
    "btd,fd->btf": (
        (4, 5, 24), (6, 24), ("batch", None, None), ("mlp", "embed"), ("batch", None, "mlp"),
    ),
    "btd,kghd->btkgh": (
        (4, 5, 24), (2, 3, 4, 24), ("batch", None, None), ("heads", "groups", None, "embed"),
        ("batch", None, "heads", "groups", None),
    ),
    "btnxy,dnxy->btd": (
        (4, 5, 2, 3, 4), (6, 2, 3, 4), ("batch", None, "heads", "groups", None),
        ("embed", "heads", "groups", None), ("batch", None, None),
    ),
}  # fmt: skip


def rounded(x, summed):
    """Each row as the nearest of e4m3's numbers times the row's greatest / 448, in float64."""
    axes = tuple(range(x.ndim - summed, x.ndim))
    scale = np.abs(x).max(axes, keepdims=True).astype(np.float32) / np.float32(448)
    near = (x / np.where(scale == 0, 1, scale)).astype(ml_dtypes.float8_e4m3fn)
    return near.astype(np.float64) * scale


@pytest.mark.parametrize("sizes", [(), (2, 2, 2)])
@pytest.mark.parametrize("expr", PRODUCTS)
def test_a_product_is_that_of_the_nearest_numbers(expr, sizes):
    of_x, of_w, x_axes, w_axes, axes = PRODUCTS[expr]
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=s) * np.exp(rng.normal(size=s)) for s in (of_x, of_w))
    x, w = x.astype(np.float32), w.astype(np.float32)
    x[0, 1] *= 1e4  # rows of their own scales
    w[1] *= 1e-6
    x[1, 2] = 0
    with set_mesh(*sizes):
        placed = [
            jax.device_put(a, mesh.sharding(n, a.shape)) for a, n in ((x, x_axes), (w, w_axes))
        ]
        found = np.asarray(jax.jit(float8.product, static_argnums=(0, 3))(expr, *placed, axes))
    summed = 3 if expr.endswith("->btd") else 1
    wanted = np.einsum(expr, rounded(x, summed), rounded(w, summed))
    assert np.abs(found[1, 2]).max() == 0
    size = np.einsum(expr, np.abs(rounded(x, summed)), np.abs(rounded(w, summed)))
    parts = 2**-8 * size if sizes else 0.0  # devices add up what is in bfloat16
    assert (np.abs(found - wanted) <= 2**-8 * np.abs(wanted) + parts + 1e-5 * size).all()
    exact = np.einsum(expr, x.astype(np.float64), w.astype(np.float64))
    gap = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-3 < gap < 2**-4  # it is float8, and no worse


@pytest.mark.parametrize("sizes", [(), (1, 4, 1), (1, 2, 2)])
def test_what_goes_into_down_by_kernel(hopper_kernels, sizes):
    """Against float64, a row of zeros and rows of their own scales among it; where devices have
    parts of a row there is no kernel for it."""
    rng = np.random.default_rng(0)
    x, gate, up = (rng.normal(size=s) for s in ((4, 70, 24), (512, 24), (512, 24)))
    gate *= 0.3
    x[0, 1] *= 1e3
    x[1, 2] = 0
    x, gate, up = (np.float64(jnp.bfloat16(a)) for a in (x, gate, up))
    a, b = (rounded(x, 1) @ rounded(w.ravel(), 1).reshape(w.shape).T for w in (gate, up))
    wanted = a * np.exp(-np.logaddexp(0, -a)) * b
    with set_mesh(*sizes):
        placed = [
            jax.device_put(jnp.bfloat16(v), mesh.sharding(n, v.shape))
            for v, n in (
                (x, ("batch", None, None)), (gate, ("mlp", "embed")), (up, ("mlp", "embed"))
            )
        ]  # fmt: skip

        @jax.jit
        def run(x, *matrices):
            matrices = [float8.Float8(w) for w in matrices]
            if not float8.has_kernel(*matrices):
                return None
            return float8.silu_gated(x, *matrices)[:2]

        if sizes:  # JAX's interpreter is for one device: others' barriers are errors to it
            found = jax.eval_shape(run, *placed)
            assert (found is None) == (sizes == (1, 2, 2))
            assert found is None or [x.sharding.spec[0] for x in found] == [mesh.BATCH] * 2
            return
        found = run(*placed)
    numbers, scale = (np.asarray(v, np.float64) for v in found)
    assert not numbers[1, 2].any() and np.isfinite(scale).all()
    np.testing.assert_allclose(scale, np.abs(wanted).max(-1) / 448, rtol=0.02, atol=1e-30)
    near = (2**-4 + 2**-6) * np.abs(wanted) + 2**-9 * scale[..., None]
    assert (np.abs(numbers * scale[..., None] - wanted) <= near).all()
    assert np.abs(numbers).max(-1)[0, 0] == 448


def near(found, wanted):
    """Whether numbers times scales are the nearest to what is wanted, in float64 [B, T, ...]."""
    numbers, scale = (np.asarray(v, np.float64) for v in found)
    flat = wanted.reshape(*wanted.shape[:2], -1)
    numbers, scale = numbers.reshape(flat.shape), scale[..., None]
    assert np.isfinite(scale).all() and not numbers[1, 2].any()  # which is a row of zeros
    np.testing.assert_allclose(scale[..., 0], np.abs(flat).max(-1) / 448, rtol=1e-4, atol=1e-29)
    # A half of e4m3's last bit, and of the bit of bfloat16 in which a row waits.
    bound = (2**-4 + 2**-8) * np.abs(flat) + 2**-10 * scale
    assert (np.abs(numbers * scale - flat) <= bound).all()
    assert np.abs(numbers).max(-1)[0, 0] == 448


@pytest.mark.parametrize("sizes", [(), (1, 4, 1), (1, 2, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_tokens_by_kernel(hopper_kernels, sizes, normed):
    """Against float64; a norm of whole rows on any mesh, and attention's results where a device has
    all heads."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 70, 2, 3, 256)) * np.exp(rng.normal(size=(4, 70, 1, 1, 1)))
    x[0, 1] *= 1e3
    x[1, 2] = 0
    x, scale = np.float64(jnp.bfloat16(x)), rng.normal(size=1536)
    axes = ("batch", None, "heads", None, None)
    if normed:
        x, axes = x.reshape(4, 70, -1), ("batch", None, None)
    with set_mesh(*sizes):
        given = jax.device_put(jnp.bfloat16(x), mesh.sharding(axes, x.shape))
        weight = jax.device_put(np.float32(scale), mesh.sharding(("embed",), scale.shape))

        @jax.jit
        def run(x, weight):
            if normed:
                return float8.normed(x, weight, 1e-6)[:2]
            return float8.of_tokens(x)[:2]

        if sizes:
            text = jax.jit(run).trace(given, weight).jaxpr.pretty_print()
            assert ("shard_map" in text) == (normed or sizes == (1, 4, 1))
            found = jax.eval_shape(run, given, weight)
            assert all(each.sharding.spec[0] == mesh.BATCH for each in found)
            return
        found = run(given, weight)
    if normed:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.float32(scale)
    near(found, x)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_several_rows_a_program(hopper_kernels, monkeypatch, stages):
    """Slots of shared memory are taken again, and there are programs without a row."""
    for module in (hopper, rows):
        monkeypatch.setattr(module, "PROCESSORS", 4)
    monkeypatch.setattr(rows, "PROGRAMS", 1)
    monkeypatch.setattr(rows, "STAGES", stages)
    for count in (3, 14):
        x = np.random.default_rng(0).normal(size=(1, count, 512)) ** 3
        x[0, 1] *= 1e3
        x = np.float64(jnp.bfloat16(x))
        numbers, scale = rows.rounded_rows(jnp.bfloat16(x[0]))
        found = np.float64(numbers) * np.float64(scale)[:, None]
        assert (np.abs(found - x[0]) <= 2**-4 * np.abs(x[0]) + 2**-10 * scale[:, None]).all()


@functools.cache
def wide():
    """A model of one layer that a kernel rounds for, and tokens: hidden states of parameters."""
    cfg = dataclasses.replace(MODELS["even"].take_layers((0,)), width=512, mlp_width=512)
    params = decoder.init_params(jax.random.key(0), cfg, jnp.bfloat16)
    batch = random_batch(0, rows=1)

    def run(params):
        return decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16, remat="none")

    return run, params, float8.marked(params, cfg)


def test_norms_are_rounded_for_what_reads_them(hopper_kernels, monkeypatch):
    """One for query, key and value, one for gate and up; the last one for the head is not."""
    run, params, marked = wide()
    normed, seen = float8.normed, []
    monkeypatch.setattr(float8, "normed", lambda *a: seen.append(a[0].shape) or normed(*a))
    jax.eval_shape(run, params)
    assert seen == []
    jax.eval_shape(run, marked)
    assert seen == [(1, 16, 512)] * 2


@pytest.mark.slow
def test_a_layer_is_near_itself_by_kernel(hopper_kernels, monkeypatch):
    run, *params = wide()
    exact, found = (np.float32(run(w)) for w in params)
    monkeypatch.setattr(devices, "is_hopper", lambda: False)
    other = np.float32(run(params[1]))
    assert 0.01 < apart(found, exact) < 1.1 * apart(other, exact)


def test_a_network_is_near_itself_by_kernel(hopper_kernels, monkeypatch):
    rng = np.random.default_rng(0)
    w = {n: jnp.bfloat16(rng.normal(size=(512, 32)) / 5) for n in ("gate", "up")}
    w["down"] = jnp.bfloat16(rng.normal(size=(32, 512)) / 20)
    x = jnp.bfloat16(rng.normal(size=(2, 20, 32)))
    exact = np.float32(layer.gated(w, x, "", jax.nn.silu))
    w = {n: float8.Float8(matrix) for n, matrix in w.items()}
    found = [np.float32(layer.gated(w, x, "", f)) for f in (jax.nn.silu, jax.nn.relu)]
    monkeypatch.setattr(devices, "is_hopper", lambda: False)
    other = [np.float32(layer.gated(w, x, "", f)) for f in (jax.nn.silu, jax.nn.relu)]
    assert 0 < apart(found[0], exact) < 1.1 * apart(other[0], exact)
    np.testing.assert_array_equal(found[1], other[1])


@functools.cache
def dense_hidden(name, in_float8, *sizes):
    cfg = MODELS[name]
    with set_mesh(*sizes):
        abstract = decoder.abstract_params(cfg)
        params = jax.device_put(numbers(name), jax.tree.map(lambda x: x.sharding, abstract))

        @jax.jit
        def run(params, batch):
            params = float8.marked(params, cfg) if in_float8 else params
            return decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")

        return np.asarray(run(params, mesh.shard_batch(random_batch(0))))


def apart(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_is_near_the_model(name):
    assert 1e-4 < apart(dense_hidden(name, True), dense_hidden(name, False)) < 0.3


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_give_what_one_gives(name):
    one, eight = dense_hidden(name, True), dense_hidden(name, True, 2, 2, 2)
    # The models are so small that roundings, one here or there, are not averaged out.
    assert apart(eight, one) < 0.7 * apart(one, dense_hidden(name, False))


KEEP, HIDDEN = (0, 1, 3), 0.5


def loss_by_the_book(params, dense, batch, in_float8):
    """KL and the layers' term; the student is not rounded."""
    cfg = MODELS["even"]
    teacher = float8.marked(dense, cfg) if in_float8 else dense
    kl, gap = written_out(params, dense, cfg, KEEP, batch, teacher)
    return kl + HIDDEN * gap, (kl, gap)


@pytest.mark.parametrize("in_float8", [False, True])
def test_a_step_learns_from_the_rounded_model_and_is_not_rounded(in_float8):
    cfg, batch = MODELS["even"], random_batch(0)
    dense = jax.tree.map(jnp.asarray, numbers("even"))
    spec = recipe(hidden=HIDDEN, float8=in_float8, weight="uniform")
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    step = distill.make_train_step(
        cfg.take_layers(KEEP), spec, optimizer, teacher_cfg=cfg, keep=KEEP, dtype=jnp.float32,
        remat="none",
    )  # fmt: skip
    start = decoder.take_layers(dense, cfg, KEEP)
    truth = jax.jit(jax.grad(loss_by_the_book, has_aux=True), static_argnums=3)
    gradient, said = truth(start, dense, batch, in_float8)
    _, other = truth(start, dense, batch, not in_float8)
    after, metrics = step(distill.init_state(start, optimizer, 2.0), dense, batch, None)
    for name, right, wrong in zip(("kl", "hidden"), said, other, strict=True):
        assert float(metrics[name]) == pytest.approx(float(right), rel=1e-3)
        assert float(metrics[name]) != pytest.approx(float(wrong), rel=5e-3)
    clip = min(1.0, spec.optimizer.clip / float(metrics["grad_norm"]))
    found = jax.tree.map(lambda m: m / (1 - spec.optimizer.b1) / clip, after.opt_state[1][0].mu)
    far, size = (sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)) for tree in (
        jax.tree.map(jnp.subtract, found, gradient), gradient
    ))  # fmt: skip
    assert far**0.5 < 1e-3 * size**0.5


@pytest.mark.parametrize("changes", [{"teacher": "cache"}, {"teacher": "none"}, {"freeze": True}])
def test_it_needs_a_dense_model_that_only_teaches(changes):
    with pytest.raises(ValueError, match="float8=true is of a dense model that only teaches"):
        recipe(float8=True, **changes)


def test_what_was_made_before_it_came_is_still_good():
    assert "float8" not in recipe().facts() and recipe(float8=True).facts()["float8"] is True
    assert {*recipe().facts(), "float8"} == {field.name for field in dataclasses.fields(recipe())}


@pytest.mark.parametrize(
    ("number", "said"),
    [("8.0", False), ("8.9", True), ("9.0", True), ("10.0", True), ("gfx942", False)],
)
def test_which_gpus_have_it(number, said, monkeypatch):
    assert not devices.has_float8()  # these are CPUs
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=number)])
    assert devices.has_float8() is said
