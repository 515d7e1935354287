"""The TPU attention kernel: interpreted against dense attention, and compiled for TPUs ahead of
time."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from e3jax import devices, mesh
from e3jax.models import attention, decoder, generate, splash
from e3jax.models.config import ModelConfig
from training_tiny import set_mesh

# ---------------------------------------------------------------- numerics


def packed_segments(rows, time):
    """int32 [B, T]: documents of all lengths, padding behind; the last row is nothing but that."""
    rng = np.random.default_rng(1)
    segments = 1 + np.sort(rng.integers(0, 4, (rows, time)), axis=1)
    segments[:, time - time // 7 :] = 0
    segments[-1] = 0
    return segments.astype(np.int32)


CASES = [  # T, K, G, H, window, greatest block, soft cap, whether there are sinks
    (128, 2, 2, 64, None, 512, None, True),
    (300, 1, 4, 80, 100, 512, None, False),  # one block of 384, the row padded
    (500, 1, 2, 96, 200, 128, 1.5, True),  # four; the window reaches over them
    pytest.param(520, 1, 1, 256, 1, 512, None, False, marks=pytest.mark.slow),  # two of 384
]
NAMES = "time", "kv_heads", "groups", "width", "window", "block", "cap", "sinks"


@pytest.mark.cases(1)
@pytest.mark.parametrize(NAMES, CASES)
def test_kernel_is_dense_attention(
    time, kv_heads, groups, width, window, block, cap, sinks, monkeypatch
):
    """Outputs and gradients in float32, at padding too."""
    monkeypatch.setattr(splash, "BLOCK", block)
    rows, rng = 2, np.random.default_rng(0)
    q_shape, k_shape = (rows, time, kv_heads, groups, width), (rows, time, kv_heads, width)
    shapes = (q_shape, k_shape, k_shape, q_shape)
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(packed_segments(rows, time))
    more = [jnp.asarray(2 * rng.normal(size=(kv_heads, groups)), jnp.float32)] if sinks else []

    @functools.partial(jax.jit, static_argnums=0)
    def outcome(make):
        attend = make(segments, (window,), cap)
        y, pull = jax.vjp(lambda *arrays: attend(jnp.int32(0), *arrays), q, k, v, *more)
        return y, *pull(g)

    wanted = outcome(attention.by_mask)
    for name, a, b in zip(("y", "dq", "dk", "dv", "ds"), outcome(attention.by_splash), wanted):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5, err_msg=name)


def test_float32_is_multiplied_as_float32():
    """A TPU would else do it in bfloat16: every product asks for it, backward too."""
    segments = jnp.ones((1, 128), jnp.int32)

    def program(dtype):
        q, k = jnp.zeros((1, 128, 1, 1, 64), dtype), jnp.zeros((1, 128, 1, 64), dtype)
        attend = splash.make_attention(segments, None)
        grad = jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32)), (0, 1, 2))
        return str(jax.make_jaxpr(grad)(q, k, k))

    exact, fast = program(jnp.float32), program(jnp.bfloat16)
    assert exact.count("dot_general") == fast.count("dot_general") >= 9  # fwd 2, dq 3, dkv 4
    assert exact.count("Precision.HIGHEST") == 2 * exact.count("dot_general")  # of both operands
    assert fast.count("Precision.HIGHEST") == 0


def test_blocks_cover_the_row():
    for time in range(128, 4700, 7):
        block, count = splash.blocks(time)
        assert block % 128 == 0 and block <= 512
        assert time <= block * count < time + 128 * count
    assert splash.blocks(4096) == (512, 8)


CFG = ModelConfig(
    family="qwen3", num_layers=3, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=64, max_position=256, norm_eps=1e-6, tied=False, windows=(None, 40, None),
    qk_norm=True,
)  # fmt: skip


def test_heads_that_do_not_divide_the_mesh_are_replicated():
    """2 key-value heads over 4 devices; several rows of windows a device."""
    rng, segments = np.random.default_rng(0), packed_segments(4, 128)
    q = rng.normal(size=(4, 128, 2, 2, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, 128, 2, 8)).astype(np.float32)

    def gradients(q, k, v, segments):
        attend = splash.make_attention(segments, 9)
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), (0, 1, 2))(q, k, v)

    alone = jax.jit(gradients)(q, k, v, segments)
    with set_mesh(1, 2, 4):
        spread = jax.jit(gradients)(*mesh.shard_batch((q, k, v, segments)))
    for a, b in zip(spread, alone):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_model_with_the_kernel_on_a_mesh(monkeypatch):
    """Gates, windows and statistics; loss and every gradient."""
    rows, time, rng = 4, 128, np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab_size, (rows, time)).astype(np.int32)
    positions = np.tile(np.arange(time, dtype=np.int32), (rows, 1))
    segments = packed_segments(rows, time)
    probe = rng.normal(size=(rows, time, CFG.width))
    gates = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], np.float32)

    def outcome(make, remat):
        monkeypatch.setattr(decoder, "make_attention", lambda s, windows, *_: make(s, windows))

        def loss(params, gates, batch):
            norms = lambda before, after: jnp.sum(after**2, axis=(1, 2))
            h, seen = decoder.hidden(
                params, batch, CFG, dtype=jnp.float32, gates_bl=gates, remat=remat, observe=norms
            )
            return jnp.mean(probe * h), seen

        with set_mesh(2, 2, 2):
            batch = decoder.Batch(tokens, positions, segments, tokens, segments > 0)
            batch, rows_gates = mesh.shard_batch((batch, gates))
            # Hotter, and a rounding of the weights would move the gradients by 1e-4.
            params = jax.tree.map(lambda w: 2 * w, decoder.init_params(jax.random.key(0), CFG))
            params["embed"] *= 10
            step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
            return step(params, rows_gates, batch)

    wanted = outcome(attention.by_mask, "none")
    found = outcome(attention.by_splash, "selective")
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted)):
        scale, name = np.abs(b).max(), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=name)
        assert scale > 0 or name.endswith(
            "['head']"
        )  # which reads the hidden states, not makes them


# ---------------------------------------------------------------- compiled for a TPU


@pytest.fixture
def tpu_mesh(monkeypatch):
    """(topology) -> a mesh (1, 2, 2) of TPUs that are not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install 'jax[tpu]'")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by the other worker

    def make(topology):
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        return mesh.make_mesh(1, 2, 2, devices=found.devices)

    return make


LONG = 1024  # no other size of these models
TPU_CFG = dataclasses.replace(
    CFG, width=256, mlp_width=384, num_heads=8, vocab_size=512, max_position=2 * LONG
)


def trace_step(cfg, remat):
    """Forward and backward by weights and gates, traced under the mesh that is set."""
    rows = lambda dtype, width: jax.ShapeDtypeStruct(
        (4, width), dtype, sharding=mesh.sharding(("batch", None))
    )
    batch = decoder.Batch(*[rows(jnp.int32, LONG)] * 4, rows(bool, LONG))

    def loss(params, gates, batch):
        h = decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16, gates_bl=gates, remat=remat)
        return jnp.sum(h.astype(jnp.float32) ** 2)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return step.trace(decoder.abstract_params(cfg), rows(jnp.float32, cfg.num_layers), batch)


def kernels(text):
    """Names of the kernels that a compiled program calls, one a call."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return sorted(re.search(r"splash_mha_(fwd|dq|dkv)_", line)[1] for line in calls)


def squares(text):
    """Arrays of [T, T] in a program."""
    return re.findall(rf"\w+\[(?:\d+,)*{LONG},{LONG}(?:,\d+)*\]", text)


@pytest.mark.slow
def test_compiles_for_v5p_with_two_kinds_of_windows(tpu_mesh):
    with jax.set_mesh(tpu_mesh("v5p:2x2x1")):
        assert devices.platform() == "tpu" and jax.default_backend() == "cpu"
        traced = trace_step(dataclasses.replace(TPU_CFG, head_dim=128), "selective")
        text = traced.lower().compile().as_text()
    assert kernels(text) == ["dkv", "dkv", "dq", "dq", "fwd", "fwd"]  # none is run again
    assert not squares(text)


@pytest.mark.slow
def test_compiles_for_v6e(tpu_mesh, monkeypatch):
    cfg = dataclasses.replace(TPU_CFG, head_dim=64, windows=(None,) * 3)
    with jax.set_mesh(tpu_mesh("v6e:2x2")):
        text = trace_step(cfg, "layer").lower().compile().as_text()
        monkeypatch.setattr(splash, "suits", lambda *_: False)
        dense = str(trace_step(cfg, "layer").jaxpr)
    assert kernels(text) == ["dkv", "dq", "fwd", "fwd"]
    assert not squares(text) and squares(dense)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, pytest.param(8, marks=pytest.mark.slow)])  # of two devices
def test_decoding_compiles_for_v5p(tpu_mesh, rows):
    """The prompt by the kernel, what follows from the cache, of which nothing is a copy."""
    cfg = dataclasses.replace(TPU_CFG, head_dim=128, windows=(None,) * 3)
    with jax.set_mesh(tpu_mesh("v5p:2x2x1")):
        prompts = jax.ShapeDtypeStruct(
            (rows, LONG), jnp.int32, sharding=mesh.sharding(("batch", None))
        )
        generator = generate.make_generator(cfg, dtype=jnp.bfloat16, eos=[1])
        params = decoder.abstract_params(cfg, jnp.bfloat16)
        arguments = generate.abstract_arguments(generator, params, rows, LONG + 512)
        state = arguments[1]
        number = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=mesh.sharding(("batch",)))
        new = generate.Arrival(prompts, prompts, number, number, None)
        admit = generator.admit.lower(params, state, new).compile()
        go_on = generator.go_on.lower(*arguments).compile()
    text = admit.as_text()
    after = go_on.as_text()
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert go_on.memory_analysis().temp_size_in_bytes < whole / 4  # devices; so no copy of it
    assert kernels(text) == ["fwd"] and not kernels(after)
    assert not squares(text) and f"{LONG + 512},{LONG + 512}" not in text + after
