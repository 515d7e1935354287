"""The norm and rotation of queries and keys against the textbook, its derivatives by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax.models import norm, recompute, rope
from e3jax.models.config import Rope


@pytest.mark.cases(2)
@pytest.mark.parametrize("remat", ["none", "selective"])
@pytest.mark.parametrize("heads", [(3,), (2, 3)])
def test_values_and_gradients_are_those_of_norm_then_rotation(heads, remat):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 3.0 * jax.random.normal(keys[0], (2, 5, *heads, 8))
    scale = 1.0 + jax.random.normal(keys[1], (8,))
    toward = jax.random.normal(keys[2], x.shape)
    cos_sin = rope.angles(jnp.arange(10).reshape(2, 5), Rope(theta=100.0), 8)

    def textbook(x, scale):
        y = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3) * scale
        return rope.rotate(y, cos_sin)

    def ours(x, scale):
        return norm.norm_rotate(x, scale, cos_sin, 1e-3)

    def gradients(fn):
        return jax.grad(lambda x, scale: jnp.sum(jnp.tanh(fn(x, scale)) * toward), (0, 1))(x, scale)

    np.testing.assert_allclose(ours(x, scale), textbook(x, scale), rtol=1e-5, atol=1e-6)
    for found, wanted in zip(
        gradients(recompute.checkpoint(ours, remat)), gradients(textbook), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
