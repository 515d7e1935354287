"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783), Mistral (arXiv 2310.06825) and Ministral,
Seed-OSS, and Granite 3 (https://huggingface.co/ibm-granite)."""

import functools
from typing import Any

from e3jax.hf.facts import Facts, Family, one_of, one_window, types_told, windows_by_type
from e3jax.models.config import ModelConfig

COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def read(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": facts.flag("mlp_bias")}


def write(cfg: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": cfg.out_bias, "mlp_bias": cfg.mlp_bias}


def refuse_ministral(facts: Facts) -> None:
    if facts.get("layer_types") is not None:
        raise facts.error(
            "mistral with layer_types is the ministral architecture; write model_type ministral "
            'and architectures ["MinistralForCausalLM"]'
        )


def read_seed(facts: Facts) -> dict[str, Any]:
    return read(facts) | {"out_bias": facts.flag("attention_out_bias")}


def write_seed(cfg: ModelConfig) -> dict[str, Any]:
    return write(cfg) | {"attention_bias": cfg.qkv_bias, "attention_out_bias": cfg.out_bias}


def read_granite(facts: Facts) -> dict[str, Any]:
    return read(facts) | {
        "embed_scale": facts.number("embedding_multiplier"),
        "attention_scale": facts.number("attention_multiplier"),
        "residual_scale": facts.number("residual_multiplier"),
        "logits_scale": 1.0 / facts.number("logits_scaling"),
    }


def write_granite(cfg: ModelConfig) -> dict[str, Any]:
    return write(cfg) | {
        "embedding_multiplier": cfg.embed_scale,
        "attention_multiplier": cfg.attention_scale,
        "residual_multiplier": cfg.residual_scale,
        "logits_scaling": round(1.0 / cfg.logits_scale, 9),
    }


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "LLaMA 2 and 3, Yi",
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    read,
    write,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "Mistral 7B, Nemo, Small",
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    write=lambda cfg: {"sliding_window": cfg.windows[0]},
    windows=one_window,
    refuse=refuse_ministral,
)
MINISTRAL = Family(
    "ministral",
    "MinistralForCausalLM",
    "Ministral 8B",
    MISTRAL.defaults,
    write=lambda cfg: {"sliding_window": one_of(cfg.windows)},
    windows=functools.partial(windows_by_type, every=None),
    told=types_told,
)
SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    "Seed-OSS 36B",
    {
        **COMMON,
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    read_seed,
    write_seed,
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "Granite 3",
    {
        **LLAMA.defaults,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    read_granite,
    write_granite,
)
FAMILIES = (LLAMA, MISTRAL, MINISTRAL, SEED_OSS, GRANITE)
