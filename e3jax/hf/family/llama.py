"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) and Mistral (arXiv 2310.06825)."""

from typing import Any

from e3jax.hf.facts import Facts, Family, one_window
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
        raise facts.error("mistral with layer_types is the ministral architecture, not supported")


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
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
FAMILIES = (LLAMA, MISTRAL)
