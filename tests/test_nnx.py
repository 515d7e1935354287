"""The NNX view: our arrays and names, our logits and gradients to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import e3jax
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder
from hf_tiny import assert_same_logits, random_tokens, save_tiny, torch_logits
from test_families import CASES, SIZES
from training_tiny import assert_bitwise

FAST, SLOW = ["llama"], ["deepseek_v3", "gemma2", "gpt_oss", "qwen3_moe", "mixtral", "qwen3"]
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def logits(params, tokens, gates, cfg):
    """By the functions that the view is to be a view of."""
    ids = jnp.asarray(tokens, jnp.int32)
    places, ones = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), jnp.ones_like(ids)
    batch = decoder.Batch(ids, places, ones, ids, ones > 0)
    h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, gates_bl=gates)
    return decoder.logits(params, h, cfg)


def loss(found):
    return jnp.mean(jax.nn.logsumexp(found, axis=-1) - found[..., 1])


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", FAMILIES)
def test_same_arrays_logits_and_gradients(name, tmp_path):
    family, changes = CASES.get(name, (name, {}))
    folder = save_tiny(tmp_path / "model", family, **changes)
    cfg = read_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    tokens = random_tokens(SIZES["vocab_size"], 12)
    model = e3jax.Decoder(params, cfg, dtype=jnp.float32)

    assert jax.tree.structure(model.params()) == jax.tree.structure(params)
    found = jax.jit(e3jax.Decoder.__call__)(model, tokens)
    assert_same_logits(np.asarray(found), torch_logits(folder, tokens))

    gates = np.ones((2, cfg.num_layers), np.float32)
    gates[0, 1] = gates[1, cfg.num_layers - 1] = 0  # a mask a row
    pairs = zip(jax.tree.leaves(model.params()), jax.tree.leaves(params), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    ours = jax.jit(
        jax.value_and_grad(lambda w, g: loss(logits(w, tokens, g, cfg)), argnums=(0, 1))
    )(params, gates)
    view = nnx.jit(nnx.value_and_grad(lambda m, g: loss(m(tokens, gates=g)), argnums=(0, 1)))(
        model, jnp.asarray(gates)
    )
    assert float(jnp.abs(ours[1][1]).max()) > 0
    assert_bitwise((view[0], nnx.to_pure_dict(view[1][0]), view[1][1]), (ours[0], *ours[1]))


@pytest.mark.slow
def test_split_merge_pruned_and_trained(tmp_path):
    """A pruned model of two stacks, taken apart, put together and trained as NNX does it."""
    family, changes = CASES["deepseek_v3"]
    folder = save_tiny(tmp_path / "model", family, **changes)
    cfg, keep = read_config(folder), [0, 2]
    dense = load_params(folder, cfg, jnp.float32)
    params, small = decoder.take_layers(dense, cfg, keep), cfg.take_layers(keep)
    tokens = random_tokens(SIZES["vocab_size"], 12)
    model = e3jax.Decoder(params, small, dtype=jnp.float32)
    graph, state = nnx.split(model)
    assert state["layers"]["kv_down"].get_value() is params["layers"]["kv_down"]
    assert graph == nnx.split(e3jax.Decoder(params, small, dtype=jnp.float32))[0]
    gates = jnp.asarray(np.isin(np.arange(cfg.num_layers), keep), jnp.float32)
    masked = nnx.jit(e3jax.Decoder.__call__)(
        e3jax.Decoder(dense, cfg, dtype=jnp.float32), tokens, gates=gates
    )
    np.testing.assert_array_equal(nnx.jit(e3jax.Decoder.__call__)(model, tokens), masked)

    other = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    assert not np.asarray(other(tokens)).any()

    @nnx.jit
    def step(model, optimizer):
        value, gradient = nnx.value_and_grad(lambda m: loss(m(tokens)))(model)
        optimizer.update(model, gradient)
        return value

    before = np.array(params["embed"])
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    first = step(model, optimizer)
    assert step(model, optimizer) < first
    np.testing.assert_array_equal(params["embed"], before)
    assert (model.params()["embed"] != before).any()
