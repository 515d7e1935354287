"""OLMo 2 (arXiv 2501.00656): norms after attention and mlp, and none before."""

from typing import Any

from e3jax.hf.facts import Facts, Family
from e3jax.hf.family.llama import COMMON
from e3jax.models.config import ModelConfig


def read(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    return {"norms": "after", "qk_norm": "whole", "qkv_bias": bias, "out_bias": bias}


def write(cfg: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": cfg.out_bias}


FAMILIES = (
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "OLMo 2",
        {
            **COMMON,
            "vocab_size": 50304,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
        },
        read,
        write,
    ),
)
