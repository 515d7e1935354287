"""The fit before training finds matrices that are known, and touches nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import mesh
from e3jax.distill import least_squares
from e3jax.models import decoder
from sharded_tiny import MODELS, placed
from training_tiny import assert_bitwise, random_batch, set_mesh

KEEP = (0, 1, 3)


def lazy(params, stack, layer):
    """The layers of a stack, of which one adds nothing to the residual stream."""
    changed = {
        name: w.at[layer].set(0)
        for name, w in params[stack].items()
        if name in ("o", "down") or name.endswith("_bias")
    }
    return {**params, stack: {**params[stack], **changed}}


def fitted(cfg, dense, student, keep=KEEP):
    batches = [mesh.shard_batch(random_batch(step)) for step in range(3)]
    return least_squares.fitted(dense, cfg, keep, student, batches, dtype=jnp.float32)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "name, sizes", [("even", (2, 2, 2)), ("odd", (1, 2, 2)), ("parallel", (1, 1, 1))]
)
def test_matrices_that_were_spoilt_are_found_again(name, sizes, monkeypatch):
    """Where the removed layer did nothing, what fits the dense model's streams is its own matrices:
    all kept ones are drawn anew, and come back one after the other."""
    monkeypatch.setattr(least_squares, "RIDGE", 1e-7)
    cfg = dataclasses.replace(MODELS[name], residual_scale=0.5)
    with set_mesh(*sizes):
        dense = lazy(placed(name), "layers", 2)
        student = decoder.take_layers(dense, cfg, KEEP)
        true = np.asarray(student["layers"]["down"])
        noise = jax.random.normal(jax.random.key(0), true.shape)
        spoilt = {**student["layers"], "down": jnp.asarray(true) + 0.2 * np.asarray(noise)}
        spoilt["down"] = jax.device_put(spoilt["down"], student["layers"]["down"].sharding)
        found = fitted(cfg, dense, {**student, "layers": spoilt})
    np.testing.assert_allclose(found["layers"].pop("down"), true, atol=2e-3)
    del student["layers"]["down"]
    assert_bitwise(jax.device_get(found), jax.device_get(student))


@pytest.mark.slow
def test_what_is_not_linear_stays_as_it_is():
    """Behind a norm, and in layers with experts; a dense layer before those is fitted."""
    with set_mesh():
        for name in ("odd-norms", "sparse"):
            cfg, dense, keep = MODELS[name], placed(name), (0, 2, 3)
            student = decoder.take_layers(dense, cfg, keep)
            found = fitted(cfg, dense, student, keep)
            if name == "sparse":
                before, after = (tree["dense_layers"].pop("down") for tree in (student, found))
                assert float(jnp.max(jnp.abs(after - before))) > 0
            assert_bitwise(jax.device_get(found), jax.device_get(student))


def test_streams_come_nearer():
    """Of layers that matter the removed one's part is made up for in part, on other windows too."""
    with set_mesh():
        cfg, dense = MODELS["even"], placed("even")
        student = decoder.take_layers(dense, cfg, KEEP)
        batch = mesh.shard_batch(random_batch(9))

        def gap(params):
            ours, theirs = (
                decoder.hidden(p, batch, c, dtype=jnp.float32, remat="none")
                for p, c in ((params, cfg.take_layers(KEEP)), (dense, cfg))
            )
            return float(jnp.mean((ours - theirs) ** 2))

        assert gap(fitted(cfg, dense, student)) < 0.9 * gap(student)
