"""The decoder: who sees whom, masked = sliced, sizes, shardings on meshes small and large."""

import contextlib
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import mesh
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.hf.families import FAMILIES, from_hf, read_config
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from hf_tiny import tiny_model
from training_tiny import assert_close, random_batch, set_mesh

CFG = ModelConfig(
    family="qwen3", num_layers=4, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=64, max_position=64, norm_eps=1e-6, tied=False, windows=(None, 3, 5, None),
    qk_norm=True,
)  # fmt: skip
EVERYTHING = dataclasses.replace(CFG, qkv_bias=True, out_bias=True, mlp_bias=True)
T = 16
SEGMENTS = np.repeat([1, 2, 3, 0], [6, 5, 3, 2])  # the last two are padding


@functools.cache
def hot_params(cfg=CFG, dtype=jnp.float32):
    """Random numpy weights with which every layer matters; no bias is zero, no norm one."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        w = 0.2 * rng.normal(size=leaf.shape) + (1.0 if "norm" in str(path[-1]) else 0.0)
        return w.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(cfg))


def make_batch(tokens, segments):
    """[B, T] tokens in documents; targets and mask do not matter here."""
    tokens, segments = np.atleast_2d(tokens).astype(np.int32), np.atleast_2d(segments)
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    t = np.arange(tokens.shape[1])
    positions = t - np.maximum.accumulate(np.where(starts, t, 0), axis=1)
    ints = [np.asarray(x, np.int32) for x in (tokens, positions, segments, tokens)]
    return decoder.Batch(*ints, np.ones_like(tokens, bool))


def packed_batch(rows=1):
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (rows, T))
    return make_batch(tokens, np.tile(SEGMENTS, (rows, 1)))


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "remat"))
def run(params, batch, cfg=CFG, dtype=jnp.float32, remat="none", **masks):
    """float32 logits."""
    h = decoder.hidden(params, batch, cfg, dtype=dtype, remat=remat, **masks)
    return decoder.logits(params, h, cfg)


# ---------------------------------------------------------------- who sees whom


def reach(windows) -> np.ndarray:
    """Bool [T, T]: t depends on s, by following attention through layers of these windows."""
    t = np.arange(T)
    sees = np.eye(T, dtype=bool)
    for window in windows:
        back = t[:, None] - t[None]
        edge = (back >= 0) & (back < (window or T)) & (SEGMENTS[:, None] == SEGMENTS[None])
        sees = (edge.astype(int) @ sees.astype(int)) > 0
    return sees


@pytest.mark.parametrize("windows", [(2, 2, 3), (3, None), (3, 1)])
def test_gradients_reach_exactly_what_may_be_seen(windows):
    """Row t is scored at position t alone, and every place has an embedding of its own: so the
    gradient of the table is that of each position's output by each position's input."""
    cfg = dataclasses.replace(CFG, num_layers=len(windows), windows=windows, vocab_size=T * T)
    params = hot_params(cfg)
    batch = make_batch(np.arange(T * T).reshape(T, T), np.tile(SEGMENTS, (T, 1)))
    probe = np.eye(T)[..., None] * np.random.default_rng(1).normal(size=(T, T, cfg.width))

    @jax.jit
    def gradient(embed):
        def loss(embed):
            inputs = {**params, "embed": embed}
            h = decoder.hidden(inputs, batch, cfg, dtype=jnp.float32, remat="none")
            return jnp.sum(h * probe)

        return jax.grad(loss)(embed)

    by_input = np.asarray(gradient(params["embed"])).reshape(T, T, cfg.width)
    np.testing.assert_array_equal(np.abs(by_input).max(-1) > 0, reach(windows))


def test_packed_documents_have_the_logits_they_have_alone():
    params, packed = hot_params(), packed_batch()
    together = np.asarray(run(params, packed))[0]
    for document in (1, 2, 3):
        where = document == SEGMENTS
        alone = make_batch(packed.tokens[:, where], np.ones((1, where.sum())))
        np.testing.assert_allclose(together[where], run(params, alone)[0], atol=2e-5)
    one = make_batch(packed.tokens, np.ones((1, T)))
    assert np.abs(together - np.asarray(run(params, one))[0])[6:14].max() > 0.1


# ---------------------------------------------------------------- masked = sliced


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("dtype", "remat"), [(jnp.float32, "none"), (jnp.float32, "selective"), (jnp.bfloat16, "layer")]
)
def test_masked_sliced_and_indexed_models_are_one(dtype, remat):
    """With a different kind of attention in each layer; the slice may have fewer kinds."""
    params, batch = hot_params(EVERYTHING, dtype), packed_batch(rows=3)
    keeps = [(0, 3), (1, 2), (0, 2)]
    gates = np.array([[float(i in keep) for i in range(4)] for keep in keeps], np.float32)
    masked = np.asarray(run(params, batch, EVERYTHING, dtype, remat, gates_bl=gates))
    for row, keep in enumerate(keeps):
        sliced = run(
            decoder.take_layers(params, EVERYTHING, keep),
            batch,
            EVERYTHING.take_layers(keep),
            dtype,
            remat,
        )
        indexed = run(params, batch, EVERYTHING, dtype, remat, layer_ids=jnp.array(keep))
        np.testing.assert_array_equal(masked[row], sliced[row])
        np.testing.assert_array_equal(masked[row], indexed[row])
    assert np.abs(np.diff(masked, axis=0)).max(axis=(1, 2)).min() > 0.1  # the masks matter


def test_layer_ids_follow_the_order_given():
    params, batch = hot_params(), packed_batch()
    order = (3, 1)
    swapped = run(decoder.take_layers(params, CFG, order), batch, CFG.take_layers(order))
    np.testing.assert_array_equal(run(params, batch, layer_ids=jnp.array(order)), swapped)
    assert np.abs(run(params, batch, layer_ids=jnp.array([1, 3])) - swapped).max() > 0.1


def test_observe_sees_the_residual_stream_around_every_layer():
    params, batch = jax.tree.map(jnp.asarray, hot_params()), packed_batch(rows=2)
    stats = lambda before, after: {"before": before, "after": after}
    h, seen = decoder.hidden(params, batch, CFG, dtype=jnp.float32, observe=stats)
    assert seen["before"].shape == (4, 2, T, CFG.width)
    np.testing.assert_array_equal(seen["before"][0], params["embed"][batch.tokens])
    np.testing.assert_array_equal(seen["before"][1:], seen["after"][:-1])
    norm = decoder.rms_norm(seen["after"][-1], params["final_norm"], CFG.norm_eps)
    np.testing.assert_allclose(h, norm, atol=1e-5)
    first = decoder.take_layers(params, CFG, [0])  # a model of it ends where layer 1 begins
    end = decoder.hidden(first, batch, CFG.take_layers([0]), dtype=jnp.float32)
    norm = decoder.rms_norm(seen["before"][1], params["final_norm"], CFG.norm_eps)
    np.testing.assert_allclose(end, norm, atol=1e-5)


# ---------------------------------------------------------------- sizes and the start


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"head_dim": 16, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_count_params_is_what_transformers_counts(family, changes):
    model = tiny_model(family, **changes)
    cfg = from_hf(json.loads(model.config.to_json_string(use_diff=False)), family)
    assert decoder.count_params(cfg) == model.num_parameters()
    params = decoder.init_params(jax.random.key(0), cfg)
    assert decoder.count_params(cfg) == sum(w.size for w in jax.tree.leaves(params))
    assert jax.tree.structure(params) == jax.tree.structure(decoder.abstract_params(cfg))


@pytest.mark.slow
def test_init_scale():
    cfg = dataclasses.replace(
        EVERYTHING, width=64, mlp_width=128, num_layers=8, windows=(None,) * 8
    )
    params = decoder.init_params(jax.random.key(0), cfg)
    for path, w in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name.endswith("norm"):
            assert np.all(w == 1), name
        elif name.endswith("bias"):
            assert np.all(w == 0), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name in ("o", "down") else 0.02
            assert abs(np.std(w) / std - 1) < 0.05 and abs(np.mean(w)) < 0.1 * std, name
    batch = packed_batch()
    logp = jax.nn.log_softmax(run(params, batch, cfg))
    nll = -np.take_along_axis(np.asarray(logp), batch.tokens[..., None], -1).mean()
    assert abs(nll - math.log(cfg.vocab_size)) < 0.1  # knows nothing yet
    other = decoder.init_params(jax.random.key(1), cfg)
    assert np.any(other["embed"] != params["embed"])


# ---------------------------------------------------------------- meshes


def pod_loss(params, gates, batch, cfg):
    """Masked student against a teacher of the same weights, as the stages do it."""
    teacher = decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16)
    h = decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16, gates_bl=gates)
    head = decoder.head(params, cfg)
    online = losses.Online(jax.lax.stop_gradient(teacher), jax.lax.stop_gradient(head))
    loss, sums = losses.token_sums(h, head, batch.targets, batch.mask, online, losses.Objective())
    return loss / jnp.sum(sums.tokens)


SMALL = dataclasses.replace(EVERYTHING, width=32, mlp_width=48)


@functools.partial(jax.jit, static_argnames="remat")
def small_step(params, batch, remat="none"):
    def loss(params):
        h = decoder.hidden(params, batch, SMALL, dtype=jnp.float32, remat=remat)
        loss, sums = losses.token_sums(
            h, decoder.head(params, SMALL), batch.targets, batch.mask, None, losses.Objective()
        )
        return loss / jnp.sum(sums.tokens)

    return jax.value_and_grad(loss)(params)


on_one_device = functools.cache(lambda: small_step(hot_params(SMALL), random_batch(0)))


@pytest.mark.cases(1)
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2)])
def test_eight_devices_are_one(sizes):
    """Loss and every gradient; (1, 2, 4) replicates the heads, 2 over 4."""
    with set_mesh(*sizes):
        shardings = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(SMALL))
        params = jax.tree.map(jax.device_put, hot_params(SMALL), shardings)
        loss, grads = small_step(params, mesh.shard_batch(random_batch(0)))
        for g, sharding in zip(jax.tree.leaves(grads), jax.tree.leaves(shardings)):
            assert g.sharding.is_equivalent_to(sharding, g.ndim)
    np.testing.assert_allclose(loss, on_one_device()[0], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(on_one_device()[1]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=name)


def test_recomputing_changes_nothing():
    loss, grads = small_step(hot_params(SMALL), random_batch(0), remat="layer")
    np.testing.assert_allclose(loss, on_one_device()[0], rtol=1e-6)
    assert_close(grads, on_one_device()[1], atol=1e-5)


def test_what_the_model_axis_does_not_divide_is_replicated():
    with set_mesh(1, 2, 4):  # 2 key-value heads over 4
        specs = decoder.param_specs(SMALL)
        assert tuple(specs["layers"]["q"]) == (None, None, None, None, "data")
        assert tuple(specs["layers"]["gate"]) == (None, "model", "data")
        assert tuple(specs["embed"]) == ("model", "data")
        params = decoder.init_params(jax.random.key(0), SMALL)
        shard = params["layers"]["gate"].addressable_shards[0].data
        assert shard.shape == (4, SMALL.mlp_width // 4, SMALL.width // 2)
    with set_mesh(1, 4, 2):
        assert decoder.param_specs(SMALL)["layers"]["q"][1] == "model"


@pytest.mark.slow
def test_init_does_not_depend_on_the_mesh():
    alone = decoder.init_params(jax.random.key(3), SMALL)
    with set_mesh(1, 4, 2):
        spread = decoder.init_params(jax.random.key(3), SMALL)
    # The same draws; XLA's erfinv differs in its last bit with the shape of a shard.
    assert_close(alone, spread, atol=1e-8)


def type_check_on_a_pod(cfg):
    """Explicit axes make a sharding mistake a type error, found without the 256 devices."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh(2, 16, 8)):
        params = decoder.abstract_params(cfg, jnp.bfloat16)
        rows = lambda dtype, width: jax.ShapeDtypeStruct(
            (64, width), dtype, sharding=mesh.sharding(("batch", None))
        )
        batch = decoder.Batch(*[rows(jnp.int32, 32)] * 4, rows(bool, 32))
        gates = rows(jnp.float32, cfg.num_layers)
        grad = jax.grad(functools.partial(pod_loss, cfg=cfg), argnums=(0, 1))
        grads, gate_grads = jax.eval_shape(grad, params, gates, batch)
    assert gate_grads.sharding.spec == gates.sharding.spec
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(params)):
        assert (g.shape, g.sharding.spec) == (w.shape, w.sharding.spec)


@pytest.mark.slow
def test_published_models_type_check_on_a_pod(shared):
    checked = set()
    for file in sorted((shared / "configs").glob("*/config.json")):
        with contextlib.suppress(UserError):  # of another family
            checked.add(dataclasses.replace(read_config(file), max_position=0))
    for cfg in checked:
        type_check_on_a_pod(cfg)
    assert len(checked) > 25


SOME = ["llama", "deepseek_v3", "gpt_oss", "gemma3_text", "cohere2"]  # the others are slow
FAMILY = [
    pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow])
    for name in FAMILIES
    if name != "kimi_k2"
]


@pytest.mark.parametrize("family", FAMILY)
def test_families_type_check_on_a_pod(family):
    """The model of transformers' defaults, but for what is odd in some of them."""
    more = {"num_experts_per_tok": 6, "num_key_value_heads": 8, "head_dim": 128}
    type_check_on_a_pod(from_hf({"model_type": family, **more}, family))
