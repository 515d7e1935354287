"""The gate: bit-exact selection forward, the derivative of h + m (Layer(h) - h) backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import mesh
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.gate import apply_gate

B, T, D, L = 3, 2, 5, 3
CFG = ModelConfig(
    family="llama", num_layers=4, width=16, mlp_width=24, num_heads=2, num_kv_heads=1, head_dim=8,
    vocab_size=19, max_position=32, norm_eps=1e-6, tied=False, windows=(None,) * 4,
)  # fmt: skip


def network(seed=0):
    """(h, weights [L, D, D], probe): layers h -> h + tanh(h W), the loss sum(probe * h)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, D)), rng.normal(size=(L, D, D)), rng.normal(size=(B, T, D))


def dense_loss(h, weights, probe, m_lb):
    """The definition, float64 numpy: every layer multiplied by its gate."""
    for w, m in zip(weights, m_lb, strict=True):
        h = h + m[:, None, None] * np.tanh(h @ w)
    return np.sum(probe * h)


def gated_loss(h, weights, probe, m_lb, remat=False):
    def body(h, xs):
        w, m = xs
        return apply_gate(h, h + jnp.tanh(h @ w), m), None

    body = jax.checkpoint(body) if remat else body
    return jnp.sum(probe * jax.lax.scan(body, h, (weights, m_lb))[0])


def test_forward_selects_where_multiplication_rounds():
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(2, 64, 8)), jnp.bfloat16)
    y = jnp.asarray(rng.normal(size=(2, 64, 8)) * 1e-2, jnp.bfloat16)
    assert np.any(
        np.asarray(h + (y - h)) != np.asarray(y)
    )  # the case that multiplication gets wrong
    out = jax.jit(apply_gate)(h, y, jnp.array([1.0, 0.0]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out[0]), np.asarray(y[0]))
    np.testing.assert_array_equal(np.asarray(out[1]), np.asarray(h[1]))


def test_a_removed_layer_that_overflows_leaves_no_trace():
    h, y = jnp.ones((2, 1, 4)), jnp.full((2, 1, 4), jnp.inf)
    m = jnp.array([0.0, 0.0])
    out, pull = jax.vjp(lambda h: apply_gate(h, y, m), h)
    np.testing.assert_array_equal(out, h)
    np.testing.assert_array_equal(pull(jnp.ones_like(h))[0], jnp.ones_like(h))


@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan+checkpoint"])
def test_gradient_of_kept_and_removed_layers(remat):
    h, weights, probe = network()
    m = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], float)  # [L, B]: every layer kept in some row
    eps, want = 1e-5, np.zeros_like(m)
    for place in np.ndindex(*m.shape):
        step = np.zeros_like(m)
        step[place] = eps
        ends = [dense_loss(h, weights, probe, m + s) for s in (step, -step)]
        want[place] = (ends[0] - ends[1]) / (2 * eps)
    args = [jnp.asarray(x, jnp.float32) for x in (h, weights, probe, m)]
    value, got = jax.jit(jax.value_and_grad(lambda m: gated_loss(*args[:3], m, remat)))(args[3])
    np.testing.assert_allclose(value, dense_loss(h, weights, probe, m), rtol=1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want[m == 0]).min() > 1e-3 and np.abs(want[m == 1]).min() > 1e-3


def test_gradient_passes_through_the_branch_taken():
    h, weights, probe = (jnp.asarray(x, jnp.float32) for x in network(1))
    m = jnp.array([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])

    def multiplied(h, weights):
        for w, gate in zip(weights, m, strict=True):
            h = h + gate[:, None, None] * jnp.tanh(h @ w)
        return jnp.sum(probe * h)

    got = jax.grad(lambda h, w: gated_loss(h, w, probe, m), argnums=(0, 1))(h, weights)
    for ours, want in zip(got, jax.grad(multiplied, argnums=(0, 1))(h, weights), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_gradient_is_summed_in_float32():
    """4,096 terms of 1: a bfloat16 sum would stop at 256."""
    h, y = jnp.zeros((1, 64, 64), jnp.bfloat16), jnp.ones((1, 64, 64), jnp.bfloat16)
    grad = jax.grad(lambda m: jnp.sum(apply_gate(h, y, m), dtype=jnp.float32))(jnp.ones(1))
    assert grad.dtype == jnp.float32 and float(grad[0]) == 4096


def random_batch(rows=4, time=12):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, CFG.vocab_size, (rows, time)).astype(np.int32)
    segments = np.where(np.arange(time) < 7, 1, 2).astype(np.int32) * np.ones_like(tokens)
    positions = np.where(np.arange(time) < 7, np.arange(time), np.arange(time) - 7)
    positions = (positions * np.ones_like(tokens)).astype(np.int32)
    return decoder.Batch(tokens, positions, segments, tokens, np.ones_like(tokens, bool))


def hot_params(dtype=jnp.float32):
    """Weights large enough for every layer to matter."""
    params = decoder.init_params(jax.random.key(0), CFG)
    return jax.tree.map(lambda w: (w * 8 if w.ndim > 2 else w).astype(dtype), params)


@pytest.mark.parametrize("dtype,remat", [(jnp.float32, "none"), (jnp.bfloat16, "layer")])
def test_masked_model_is_the_sliced_model_bit_for_bit(dtype, remat):
    """A different mask a row, against the model cut by take_layers and the one run by layer_ids."""
    params, batch = hot_params(dtype), random_batch()
    keeps = [(0, 2), (1, 3), (0, 1), (2, 3)]
    gates = np.array([[float(i in keep) for i in range(4)] for keep in keeps], np.float32)

    @functools.partial(jax.jit, static_argnames="cfg")
    def run(params, cfg, **masks):
        h = decoder.hidden(params, batch, cfg, dtype=dtype, remat=remat, **masks)
        return h.astype(jnp.float32)

    masked = np.asarray(run(params, CFG, gates_bl=gates))
    for row, keep in enumerate(keeps):
        sliced = run(decoder.take_layers(params, CFG, keep), CFG.take_layers(keep))
        by_ids = run(params, CFG, layer_ids=jnp.array(keep))
        np.testing.assert_array_equal(masked[row], sliced[row])
        np.testing.assert_array_equal(masked[row], by_ids[row])
    assert np.abs(masked[0] - masked[1]).max() > 0.1  # the masks matter


def test_gate_gradients_do_not_depend_on_the_mesh():
    params, batch = hot_params(), random_batch(rows=8)
    gates = (np.random.default_rng(1).random((8, 4)) < 0.6).astype(np.float32)

    def run(params, batch, gates):
        loss = lambda g: jnp.sum(
            decoder.hidden(params, batch, CFG, dtype=jnp.float32, gates_bl=g)[..., 0]
        )
        return jax.value_and_grad(loss)(gates)

    plain = jax.jit(run)(params, batch, gates)
    with jax.set_mesh(mesh.make_mesh(data=4, model=2)):
        placed = jax.tree.map(jax.device_put, params, shardings())
        sharded = jax.jit(run)(placed, mesh.shard_batch(batch), mesh.shard_batch(gates))
    np.testing.assert_allclose(sharded[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(sharded[1]), plain[1], rtol=1e-3, atol=1e-5)


def shardings():
    return jax.tree.map(lambda s: s.sharding, decoder.abstract_params(CFG))
