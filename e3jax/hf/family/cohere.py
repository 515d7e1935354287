"""Command R7B and Command A (arXiv 2504.00698): attention beside the mlp, rope only in windows."""

import dataclasses
from typing import Any

from e3jax.hf.facts import Facts, Family, Windows, one_of, types_told, windows_by_type
from e3jax.hf.rope import read_rope
from e3jax.models.config import ModelConfig


def windows(facts: Facts) -> Windows:
    return windows_by_type(facts, facts.size("sliding_window_pattern"))


def read(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    rope = read_rope(facts, facts.size("max_position_embeddings"))
    rope = dataclasses.replace(rope, interleaved=True)
    return {
        "norm": "layer",
        "parallel": True,
        "logits_scale": facts.number("logit_scale"),
        "qkv_bias": bias,
        "out_bias": bias,
        "rope": rope,
        "ropes": tuple(rope if window else None for window in windows(facts)),
    }


def write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "logit_scale": cfg.logits_scale,
        "attention_bias": cfg.out_bias,
        "sliding_window": one_of(cfg.windows),
    }


FAMILIES = (
    Family(
        "cohere2",
        "Cohere2ForCausalLM",
        "Command R7B, Command A",
        {
            "vocab_size": 256000,
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "logit_scale": 0.0625,
            "num_hidden_layers": 40,
            "num_attention_heads": 64,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        read,
        write,
        windows,
        types_told,
        renamed={"rms_norm_eps": "layer_norm_eps"},
    ),
)
