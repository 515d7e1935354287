"""Every family against transformers in float32, by the features that only some of them have."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from e3jax.hf.export import export
from e3jax.hf.families import from_hf, read_config, to_hf
from e3jax.hf.load import load_params
from e3jax.models import decoder
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate
from hf_tiny import (
    SIZES,
    assert_same_logits,
    model_logits,
    our_logits,
    random_tokens,
    save_tiny,
    torch_logits,
)

ROOT = pathlib.Path(__file__).parent.parent
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LONG = {  # of heads of 8 numbers, of which 6 are turned
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [1.0, 3.0, 9.0],
    },
}
OSS_YARN = {**YARN, "truncate": False}
GLM = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
CASES = {
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe-plain": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe-dense-inside": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1]}),
    "qwen3_moe-step": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.5}),
    "olmoe-normalised": (
        "olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 6, "sliding_window": 8, "head_dim": 16, "rope_parameters": OSS_YARN},
    ),
    "gpt_oss-clipped": (
        "gpt_oss",
        {"num_local_experts": 4, "swiglu_limit": 0.2, "attention_bias": False, "head_dim": 16},
    ),
    "glm4_moe": ("glm4_moe", {**GLM, "attention_bias": True, "n_group": 2, "topk_group": 1}),
    "glm4_moe-normed": ("glm4_moe", {**GLM, "use_qk_norm": True, "n_shared_experts": 2}),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v2-lite": ("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **LATENT,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": YARN,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {**LATENT, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_parameters": YARN},
    ),
    "deepseek_v3-halves": (
        "deepseek_v3",
        {**LATENT, "n_group": 2, "topk_group": 1, "rope_interleave": False},
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 4,
        },
    ),
    "gemma2-uncapped": (
        "gemma2",
        {
            "head_dim": 8,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 5,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 25,
            "final_logit_softcapping": 4.0,
            "num_hidden_layers": 7,
        },
    ),
    "gemma3_text-stretched": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "ministral": (
        "ministral",
        {
            "sliding_window": 6,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "ministral-all": ("ministral", {"sliding_window": 6, "head_dim": 8}),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 16, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "attention_bias": True,
        },
    ),
    "granite-tied": ("granite", {"tie_word_embeddings": True, "embedding_multiplier": 2.5}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "attention_bias": True, "pad_token_id": 0}),
    "smollm3-windows": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "pad_token_id": 0,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 7, "pad_token_id": 0}),
    "phi3-long": ("phi3", {**LONG, "original_max_position_embeddings": 8}),
    "phi3-short": ("phi3", {**LONG, "original_max_position_embeddings": 40}),
    "glm4": ("glm4", {"head_dim": 16, "pad_token_id": 0}),
    "glm4-unbiased": (
        "glm4",
        {
            "head_dim": 8,
            "pad_token_id": 0,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75},
        },
    ),
    "exaone4": (
        "exaone4",
        {
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "exaone4-pattern": (
        "exaone4",
        {"sliding_window": 6, "sliding_window_pattern": 3, "num_hidden_layers": 4},
    ),
    "exaone4-full": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "head_dim": 16},
    ),
    "cohere2": (
        "cohere2",
        {"sliding_window": 6, "num_hidden_layers": 5, "attention_bias": True, "logit_scale": 0.3},
    ),
    "cohere2-untied": (
        "cohere2",
        {
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "tie_word_embeddings": False,
            "logit_scale": 2.0,
        },
    ),
    "stablelm": ("stablelm", {"hidden_size": 64, "use_qkv_bias": True}),
    "stablelm-parallel": (
        "stablelm",
        {
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "nemotron-unbiased": ("nemotron", {"tie_word_embeddings": True}),
}
cases = pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
# One of each kind, those that differ most first; the others, which have no other layers than these,
# are slow tests.
KIND = (
    "deepseek_v3", "gpt_oss", "gemma3_text", "phi3-long",
    "qwen3_moe-dense-inside", "mixtral-window", "olmoe", "glm4_moe", "gemma2",
    "deepseek_v2-groups", "granite", "olmo2", "smollm3-windows",
    "glm4", "exaone4", "cohere2", "stablelm-parallel", "nemotron",
)  # fmt: skip
kinds = pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param(*CASES[name], id=name, marks=[] if name in KIND else [pytest.mark.slow])
        for name in dict.fromkeys([*KIND, *CASES])
    ],
)


@cases
def test_logits_equal_transformers(tmp_path, family, changes):
    folder = save_tiny(tmp_path, family, **changes)
    tokens = random_tokens(96, 40)  # past every window and original context
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


@pytest.mark.cases(2)
@kinds
def test_greedy_answers_equal_transformers(tmp_path, family, changes):
    """With the cache, which for latent attention holds what transformers' does not."""
    folder = save_tiny(tmp_path, family, **changes)
    cfg = read_config(folder)
    prompts = random_tokens(96, 13)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = model.generate(
            torch.as_tensor(prompts), max_new_tokens=16, do_sample=False, eos_token_id=None
        )[:, 13:]
    generator = make_generator(cfg, dtype=jnp.float32, eos=())
    ours = list(generate(generator, load_params(folder, cfg), prompts.tolist(), 2, 16))
    assert ours == theirs.tolist()
    assert len({tuple(row) for row in ours}) == 2


def cut_of(cfg):
    """Layers to keep: not all, and of every kind that the model has."""
    return [0, *range(2, cfg.num_layers)] if cfg.num_layers > 2 else [1]


@pytest.mark.cases(4)
@kinds
def test_export_is_loaded_by_transformers(tmp_path, family, changes):
    folder = save_tiny(tmp_path / "whole", family, **changes)
    cfg = read_config(folder)
    keep = cut_of(cfg)
    params = decoder.take_layers(load_params(folder, cfg), cfg, keep)
    out = export(params, keep, cfg.take_layers(keep), folder, tmp_path / "cut", card="")
    tokens = random_tokens(96, 40)
    assert_same_logits(
        model_logits(params, cfg.take_layers(keep), tokens), torch_logits(out, tokens)
    )
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config and config["num_hidden_layers"] == len(keep)


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_config_written_is_read_by_transformers(family, changes):
    """What we write of a model of any layers means the same to transformers, which adds to it."""
    given = {"num_experts_per_tok": 2} if family == "deepseek_v2" else {}
    hf = transformers.AutoConfig.for_model(family, **{**SIZES, **given, **changes})
    whole = from_hf(hf.to_dict(), "x")
    for keep in (range(whole.num_layers), cut_of(whole), [whole.num_layers - 1]):
        cfg = whole.take_layers(keep)
        written = to_hf(cfg)
        assert from_hf(written, "x") == cfg
        read = transformers.AutoConfig.for_model(**written)
        assert from_hf(read.to_dict(), "x") == cfg


def batch_of(tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    fields = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, np.ones_like(tokens), tokens)]
    return decoder.Batch(*fields, jnp.ones(tokens.shape, bool))


CUTS = ([0, 3], [1])
# A model of one layer has no loop: where layers have two ropes XLA rounds its float32 otherwise.
KINDS = {
    **dict.fromkeys(("qwen3_moe-dense-inside", "deepseek_v3", "olmoe", "gpt_oss"), CUTS),
    **dict.fromkeys(("gemma3_text-stretched", "cohere2"), CUTS[:1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", KINDS)
def test_masked_model_is_the_sliced_model_bit_for_bit(tmp_path, name, dtype):
    """Across stacks of different kinds, gates and layer numbers alike."""
    family, changes = CASES[name]
    folder, dtype = tmp_path, jnp.dtype(dtype)
    save_tiny(folder, family, **{**changes, "num_hidden_layers": 4})
    cfg = read_config(folder)
    params, batch = load_params(folder, cfg), batch_of(random_tokens(96, 12))
    run = jax.jit(decoder.hidden, static_argnames=("cfg", "dtype", "remat"))
    for keep in KINDS[name]:
        gates = jnp.zeros((2, 4)).at[:, jnp.array(keep)].set(1.0)
        masked = run(params, batch, cfg, dtype=dtype, gates_bl=gates, remat="layer")
        by_number = run(params, batch, cfg, dtype=dtype, layer_ids=jnp.array(keep), remat="none")
        cut = decoder.take_layers(params, cfg, keep)
        sliced = run(cut, batch, cfg.take_layers(keep), dtype=dtype, remat="none")
        np.testing.assert_array_equal(masked, sliced)
        np.testing.assert_array_equal(by_number, sliced)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "gemma3_text-stretched"])
def test_gradient_of_the_gates(tmp_path, monkeypatch, name):
    """Central differences, in float64, of h + m (Layer(h) - h) around a hard mask; steps are so
    small that no token changes its experts."""
    family, changes = CASES[name]
    folder = save_tiny(tmp_path, family, **{**changes, "num_hidden_layers": 4})
    cfg, tokens = read_config(folder), random_tokens(96, 12)
    params = jax.device_get(load_params(folder, cfg, jnp.float32))
    probe = np.random.default_rng(0).normal(size=(2, 12, cfg.width))
    gates = np.array([[1, 0, 1, 1], [0, 1, 0, 1]], np.float32)

    def loss(m):
        h = decoder.hidden(params, batch_of(tokens), cfg, dtype=jnp.float32, gates_bl=m)
        return jnp.sum(probe * h)

    value, found = jax.value_and_grad(loss)(jnp.asarray(gates))
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)  # what the decoder widens to
        wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
        apply = decoder.applier(batch_of(tokens), cfg, jnp.float64)

        @jax.jit
        def multiplied(m):
            h = decoder.first_stream(wide, tokens, cfg, jnp.float64)
            for run in cfg.runs:
                for i in range(run.first, run.first + run.count):
                    y = apply(decoder.weights_of(wide, run, i), h, i)
                    h = h + m[:, i, None, None] * (y - h)
            return jnp.sum(probe * decoder.last_norm(wide, h, cfg))

        want = np.zeros_like(gates, np.float64)
        for place in np.ndindex(*gates.shape):
            ends = [
                multiplied(jnp.asarray(gates, jnp.float64).at[place].add(e)) for e in (1e-6, -1e-6)
            ]
            want[place] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(value, multiplied(jnp.asarray(gates, jnp.float64)), rtol=1e-3)
    assert np.mean(np.abs(want) > 1e-2) > 0.8, want
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=1e-3 * np.abs(want).max())
