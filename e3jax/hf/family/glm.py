"""GLM-4-0414 (https://huggingface.co/zai-org/GLM-4-9B-0414): norms around attention and mlp."""

import dataclasses
from typing import Any

from e3jax.hf.facts import NAMES, Facts, Family
from e3jax.hf.family.llama import COMMON
from e3jax.hf.rope import read_partial, write_partial
from e3jax.models.config import ModelConfig


def read(facts: Facts) -> dict[str, Any]:
    found = read_partial(facts)
    rope = dataclasses.replace(found["rope"], interleaved=True)
    return found | {"rope": rope, "norms": "around", "qkv_bias": facts.flag("attention_bias")}


def write(cfg: ModelConfig) -> dict[str, Any]:
    return write_partial(cfg) | {"attention_bias": cfg.qkv_bias}


FAMILIES = (
    Family(
        "glm4",
        "Glm4ForCausalLM",
        {
            **COMMON,
            "vocab_size": 151552,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
        read,
        write,
        tensors={
            **NAMES,
            **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight"),
            "attn_out_norm": "post_self_attn_layernorm.weight",
            "mlp_out_norm": "post_mlp_layernorm.weight",
        },
    ),
)
