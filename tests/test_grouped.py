"""Grouped products against products group by group in float64, by ragged_dot and by Hopper's
kernels, which JAX's interpreter runs on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import devices
from e3jax.models import grouped, moe
from e3jax.models.config import Experts


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("block", (1, 4, 128))
def test_rows_lie_group_after_group_and_come_back(rng, block):
    group = rng.integers(0, 6, 300)  # 5 stands for none; 3 has no rows
    group[group == 3] = 2
    x = rng.normal(size=(300, 3)).astype(np.float32)
    groups = grouped.lay(jnp.asarray(group), 5, block)
    there = np.asarray(groups.send(jnp.asarray(x)))
    starts = np.cumsum(groups.sizes) - groups.sizes
    assert np.all(np.asarray(groups.sizes) % block == 0) and groups.sizes[3] == 0
    for e in range(5):
        own = x[group == e]
        np.testing.assert_array_equal(there[starts[e] : starts[e] + len(own)], own)
        assert not there[starts[e] + len(own) : starts[e] + groups.sizes[e]].any()
    wanted = np.where(group[:, None] < 5, x, 0)
    np.testing.assert_array_equal(groups.bring(jnp.asarray(there)), wanted)
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    slope = jax.grad(lambda x: jnp.sum(weights * groups.bring(groups.send(x))))(jnp.asarray(x))
    np.testing.assert_array_equal(slope, np.where(group[:, None] < 5, weights, 0))


@pytest.mark.parametrize("axis", (1, 2))
def test_kernels_multiply_each_group_by_its_own_matrix(rng, hopper_kernels, axis):
    sizes = np.array([130, 0, 60, 256])
    group = rng.permutation(np.repeat(np.arange(5), [*sizes, 20]))
    x = rng.normal(size=(len(group), 64)).astype(np.float32)
    w = rng.normal(size=(4, 64, 192)).astype(np.float32)
    dy = rng.normal(size=(len(group), 192)).astype(np.float32)
    x, w, dy = (np.asarray(jnp.bfloat16(a), np.float64) for a in (x, w, dy))

    def ours(x, w):
        groups = grouped.lay(jnp.asarray(group), 4, 128)
        w = w.transpose(0, 2, 1) if axis == 2 else w
        return groups.bring(groups.product(groups.send(x), w, axis))

    y, back = jax.vjp(ours, jnp.bfloat16(x), jnp.bfloat16(w))
    dx, dw = back(jnp.bfloat16(dy))
    known = (group < 4)[:, None]
    of = np.minimum(group, 3)
    wanted = known * np.einsum("ak,akn->an", x, w[of])
    np.testing.assert_allclose(np.float64(y), wanted, atol=0.1, rtol=5e-3)
    wanted = known * np.einsum("an,akn->ak", dy, w[of])
    np.testing.assert_allclose(np.float64(dx), wanted, atol=0.1, rtol=5e-3)
    wanted = np.stack([x[group == e].T @ dy[group == e] for e in range(4)])
    np.testing.assert_allclose(np.float64(dw), wanted, atol=0.1, rtol=5e-3)


@pytest.mark.parametrize("joined", (False, True))
def test_a_mixture_is_the_same_by_kernels(rng, hopper_kernels, monkeypatch, joined):
    experts = Experts(count=4, per_token=2, width=64, scores="softmax", joined=joined)
    shapes = {"router": (4, 64)}
    if joined:
        shapes |= {"expert_in": (4, 64, 64, 2), "expert_in_bias": (4, 64, 2)}
        shapes |= {"expert_out": (4, 64, 64), "expert_out_bias": (4, 64)}
    else:
        shapes |= {f"expert_{name}": (4, 64, 64) for name in ("gate", "up", "down")}
    w = {name: jnp.bfloat16(rng.normal(size=shape) / 8) for name, shape in shapes.items()}
    x = jnp.bfloat16(rng.normal(size=(2, 70, 64)))

    def loss(w, x):
        return jnp.sum(moe.mixture(w, x, experts, jax.nn.silu).astype(jnp.float32) ** 2)

    found = jax.value_and_grad(loss, (0, 1))(w, x)
    monkeypatch.setattr(devices, "is_hopper", lambda: False)
    wanted = jax.value_and_grad(loss, (0, 1))(w, x)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.02 * scale)
