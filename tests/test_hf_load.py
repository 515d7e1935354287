"""Checkpoints in: logits equal transformers', however they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from e3jax import mesh
from e3jax.errors import UserError
from e3jax.hf.families import read_config
from e3jax.hf.folders import source_dtype
from e3jax.hf.load import load_params
from hf_tiny import (
    SHARED,
    assert_same_logits,
    edit_json,
    our_logits,
    random_tokens,
    rewrite,
    save_tiny,
    torch_logits,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False},
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama-ungrouped": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}


@pytest.mark.cases(5)
@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_logits_equal_transformers(tmp_path, family, changes):
    folder = save_tiny(tmp_path, family, **changes)
    tokens = random_tokens(96, 40)  # five windows long
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


@pytest.mark.cases(3)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_logits_past_the_original_context(tmp_path, rope, family):
    longest = 64 if rope["rope_type"] == "dynamic" else 256
    sizes = {"max_position_embeddings": longest, "head_dim": 32, "num_hidden_layers": 2}
    folder = save_tiny(tmp_path, family, rope_parameters=dict(rope), **sizes)
    tokens = random_tokens(96, 160, rows=1)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_dtypes_in_shards(tmp_path, dtype):
    folder = save_tiny(tmp_path, "qwen2", getattr(torch, dtype), shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert source_dtype(folder) == dtype
    params = load_params(folder)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    tokens = random_tokens(96, 12)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


def test_transformers_4_form(tmp_path):
    folder = save_tiny(tmp_path, "llama", head_dim=32, max_position_embeddings=256)

    def old(config):
        del config["rope_parameters"], config["dtype"]
        config |= {"rope_theta": 5e5, "torch_dtype": "float32"}
        config["rope_scaling"] = {"type": "linear", "factor": 4.0}

    tokens = random_tokens(96, 40)
    before = our_logits(folder, tokens)
    edit_json(folder / "config.json", old)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))
    assert np.abs(our_logits(folder, tokens) - before).max() > 1e-2


@pytest.mark.parametrize("name", ["chain-math-24l", "stories260k"])
def test_real_checkpoints(name):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip("no ../shared/models")
    tokens = random_tokens(read_config(folder).vocab_size, 64)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


def test_sharded_load_is_the_same_arrays(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", torch.bfloat16, shard="20KB", attention_bias=True)
    plain = load_params(folder)
    model = 2 if jax.device_count() % 2 == 0 else 1
    with jax.set_mesh(mesh.make_mesh(model=model)):
        spread = load_params(folder)
        assert spread["layers"]["q"].sharding.spec == mesh.spec(
            (None, "heads", "groups", None, "embed")
        )
        assert jax.device_count() == 1 or not spread["layers"]["q"].is_fully_replicated
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ---- tied, stored either way


@pytest.mark.parametrize("how", ["embed", "head", "both", "alias", "alias of head"])
def test_tied_however_it_is_stored(tmp_path, how):
    folder = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    expected = load_params(folder)
    assert "head" not in expected

    def change(tensors):
        if how in ("head", "both", "alias of head"):
            tensors[HEAD] = tensors[EMBED].clone()
        if how in ("head", "alias of head"):
            del tensors[EMBED]

    alias = {"alias": {HEAD: EMBED}, "alias of head": {EMBED: HEAD}}.get(how)
    rewrite(folder, change, alias)
    jax.tree.map(np.testing.assert_array_equal, load_params(folder), expected)


def test_untied_config_with_an_alias_gets_both(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    rewrite(folder, lambda t: t.pop(HEAD), {HEAD: EMBED})
    params = load_params(folder)
    np.testing.assert_array_equal(params["head"], params["embed"])


def test_tied_but_different_is_refused(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({HEAD: t[EMBED] + 1}))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_params(folder)
