"""What backward keeps: the choices change memory and work, never the result."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from e3jax.models import decoder
from e3jax.models.config import ModelConfig

CFG = ModelConfig(
    family="qwen3", num_layers=3, width=32, mlp_width=160, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=64, max_position=64, norm_eps=1e-6, tied=False, windows=(None, None, None),
    qk_norm=True,
)  # fmt: skip
ROWS, T = 4, 32
CHOICES = ("none", "elementwise", "selective", "layer")  # in order of memory, the most first


def count_dots(jaxpr) -> int:
    """FLOPs of all matrix products, a scan's as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(count_dots, jaxprs_in_params(eqn.params)))
    return total


@functools.cache
def outcome(stage: str, remat: str):
    """(loss and gradients, bytes of temporaries, FLOPs of matrix products) of one step's model."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab_size, (ROWS, T)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 0], [12, 15, 5]).astype(np.int32), (ROWS, 1))
    positions = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    batch = decoder.Batch(tokens, positions, segments, tokens, segments > 0)
    params = jax.tree.map(lambda w: 5 * w, decoder.init_params(jax.random.key(0), CFG))
    gates = jnp.asarray(np.eye(ROWS, CFG.num_layers) == 0, jnp.float32)
    probe = jnp.asarray(rng.normal(size=(ROWS, T, CFG.width)), jnp.float32)

    def student(params):
        return jnp.sum(probe * decoder.hidden(params, batch, CFG, dtype=jnp.float32, remat=remat))

    def search(gates):
        h = decoder.hidden(params, batch, CFG, dtype=jnp.float32, gates_bl=gates, remat=remat)
        return jnp.sum(probe * h)

    loss, argument = (student, params) if stage == "student" else (search, gates)
    traced = jax.jit(jax.value_and_grad(loss)).trace(argument)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return compiled(argument), memory, count_dots(traced.jaxpr.jaxpr)


@pytest.mark.cases(1)
@pytest.mark.parametrize("stage", ["student", "search"])
def test_same_result_for_less_memory_and_more_work(stage):
    results, memory, flops = zip(*(outcome(stage, remat) for remat in CHOICES))
    for (loss, grads), name in zip(results[1:], CHOICES[1:]):
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-5, err_msg=name)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)
    assert memory[0] > memory[1] > memory[2] > memory[3], memory
    assert flops[0] < flops[1] < flops[2] < flops[3], flops


@pytest.mark.cases(1)
@pytest.mark.parametrize("stage", ["student", "search"])
def test_which_products_are_computed_again(stage):
    """Of dense attention q k; `selective` gate and up too and nothing else; layer by layer the rest
    as well, the down projection too where a gate asks for what comes out of it."""
    tokens = ROWS * T * CFG.num_layers
    heads, kv = CFG.num_heads * CFG.head_dim, CFG.num_kv_heads * CFG.head_dim
    mlp, scores = 2 * 2 * CFG.width * CFG.mlp_width, 2 * heads * T
    rest = 2 * CFG.width * (heads + 2 * kv) + 2 * heads * CFG.width + 2 * heads * T
    rest += 2 * CFG.width * CFG.mlp_width * (stage == "search")
    none, elementwise, selective, layer = (outcome(stage, remat)[2] for remat in CHOICES)
    assert elementwise - none == tokens * scores
    assert selective - elementwise == tokens * mlp
    assert layer - selective == tokens * rest
