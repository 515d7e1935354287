"""The forward pass of a search step against the decoder's own, mask by mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import mesh
from e3jax.models import decoder
from e3jax.search import prefix
from training_tiny import CFG, dense_params, random_batch, set_mesh

L = CFG.num_layers


def gates_of(*removed):
    """float32 [W, M, L] of the layers that each mask of each window removes."""
    kept = [[[i not in gone for i in range(L)] for gone in masks] for masks in removed]
    return jnp.array(kept, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("remat", ["none", "elementwise"])
def test_hidden_states_are_those_of_each_model_alone(tokens, remat, monkeypatch):
    """Whichever layer the masks leave the dense model at, the first and the last too, each window
    by itself or all together; and the gates' gradient is that of the plain masked pass."""
    monkeypatch.setattr(prefix, "PART_TOKENS", tokens)
    params = jax.tree.map(jnp.asarray, dense_params())
    windows = jax.tree.map(lambda x: jnp.asarray(x[:4]), random_batch(0))
    gates = gates_of([{0}, {1, 2}], [{3}, {0, 3}], [{1}, {2}], [{2, 3}, {3}])
    options = {"dtype": jnp.float32, "remat": remat}

    @jax.jit
    def ours(gates):
        h, dense = prefix.hidden_states(params, windows, CFG, gates, **options, dense=True)
        return jnp.sum(jnp.sin(h)), (h, dense)

    @jax.jit
    def plain(gates):
        rows = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), windows)
        h = decoder.hidden(params, rows, CFG, gates_bl=gates.reshape(8, L), **options)
        return jnp.sum(jnp.sin(h)), (h, decoder.hidden(params, windows, CFG, **options))

    (slope, found), (wanted, expected) = (jax.grad(f, has_aux=True)(gates) for f in (ours, plain))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    np.testing.assert_allclose(slope, wanted, rtol=1e-3, atol=1e-4)
    assert np.abs(wanted).max() > 1
    h, dense = prefix.hidden_states(params, windows, CFG, gates, **options, dense=False)
    assert dense is None
    np.testing.assert_allclose(h, expected[0], atol=2e-5)


def test_shared_layers_end_with_the_first_removed():
    """Windows in parts of two run the layers of that which shares least: 0 with 2, 1 with 3."""
    gates = np.ones((4, 2, 4), np.float32)
    for window, mask, layer in [(0, 0, 2), (0, 1, 0), (1, 0, 1), (1, 1, 3), (2, 0, 0), (2, 1, 1)]:
        gates[window, mask, layer] = 0
    tokens = prefix.PART_TOKENS
    alone = [[3, 1], [2, 4], [1, 2], [4, 4]]
    assert prefix.shared_layers(gates, tokens).tolist() == alone
    in_twos = [[2, 1], [2, 4], [1, 2], [4, 4]]
    assert prefix.shared_layers(gates, tokens // 2).tolist() == in_twos
    all_together = [[2, 1], [2, 2], [1, 2], [2, 2]]
    assert prefix.shared_layers(gates, tokens // 4).tolist() == all_together
    with set_mesh(2, 1, 1):
        found = jax.jit(lambda x: prefix.shared_layers(x, tokens))(mesh.shard_batch(gates))
        assert found.tolist() == all_together
