"""Two models on four meshes of eight devices, and where their weights lie."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from e3jax.models import decoder
from e3jax.models.config import Experts, Latent, Rope
from training_tiny import CFG

MODELS = {
    "even": CFG,
    # Over model=4 the groups are sharded for 2 heads, mlp and vocabulary replicated; over model=2
    # the vocabulary is.
    "odd": dataclasses.replace(
        CFG, family="qwen2", num_kv_heads=2, mlp_width=50, vocab_size=97, tied=False, qk_norm=False,
        qkv_bias=True,
    ),
    # Latent attention, a dense layer before those with experts, which are in two groups.
    "sparse": dataclasses.replace(
        CFG, family="deepseek_v3", num_heads=4, num_kv_heads=4, head_dim=12, qk_norm=False,
        latent=Latent(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6, q_rank=8),
        experts=Experts(
            count=4, per_token=2, width=16, scores="sigmoid", corrected=True, groups=2,
            groups_taken=1, group_score="two", shared_width=24,
        ),
        dense=(0,), rope=Rope(interleaved=True),
    ),
    # Norms around attention and mlp, soft caps, two ropes, neighbours turned in half of a head.
    "odd-norms": dataclasses.replace(
        CFG, family="gemma3_text", norms="around", norm_offset=1.0, attention_cap=2.0,
        logits_cap=3.0, logits_scale=0.5, embed_scale=1.5, residual_scale=0.7, turned=4, tied=False,
        windows=(5, None, 5, None), rope=Rope(interleaved=True),
        ropes=(Rope(theta=50.0, interleaved=True), Rope(interleaved=True)) * 2,
    ),
    # Norms about the mean, with biases; attention beside an mlp without a gate; a layer without
    # rope.
    "parallel": dataclasses.replace(
        CFG, family="cohere2", norm="layer", norm_bias=True, parallel=True, gated=False,
        activation="relu2", qk_norm=False, tied=False, ropes=(Rope(), None, Rope(), Rope()),
    ),
}  # fmt: skip
MESHES = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2)]
BY_NAME = {"x".join(map(str, sizes)): sizes for sizes in MESHES}
everywhere = pytest.mark.parametrize("sizes", MESHES, ids=BY_NAME)


@functools.cache
def numbers(name, keep=None):
    """Random numpy weights with which every layer matters; no bias is zero."""
    cfg, rng = MODELS[name], np.random.default_rng(0)
    draw = lambda path, leaf: (
        0.2 * rng.normal(size=leaf.shape) + path[-1].key.endswith("norm")
    ).astype(np.float32)
    params = jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(cfg))
    return (
        params if keep is None else jax.device_get(decoder.take_layers(params, MODELS[name], keep))
    )


def placed(name, keep=None):
    """The weights where the table of partition specs puts them under the mesh that is set."""
    cfg = MODELS[name] if keep is None else MODELS[name].take_layers(keep)
    shardings = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(cfg))
    return jax.tree.map(jax.device_put, numbers(name, keep), shardings)


def close(found, want, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, want)
