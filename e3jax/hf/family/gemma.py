"""Gemma 2 (arXiv 2408.00118) and the language model of Gemma 3 (arXiv 2503.19786)."""

import dataclasses
import functools
from typing import Any

from e3jax.hf.facts import (
    FULL,
    NAMES,
    SLIDING,
    Facts,
    Family,
    Windows,
    one_of,
    types_told,
    windows_by_type,
)
from e3jax.hf.rope import read_rope, write_rope
from e3jax.models.config import ModelConfig, Rope

COMMON = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
SANDWICH = {**NAMES, "mlp_norm": "pre_feedforward_layernorm.weight"}


def read(facts: Facts) -> dict[str, Any]:
    """What both share."""
    bias = facts.flag("attention_bias")
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_scale": facts.number("query_pre_attn_scalar") ** -0.5,
        "logits_cap": _cap(facts, "final_logit_softcapping"),
        "embed_scale": facts.size("hidden_size") ** 0.5,
        "norm_offset": 1.0,
        "norms": "around",
    }


def _cap(facts: Facts, key: str) -> float | None:
    return None if facts.get(key) is None else facts.number(key)


def write(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.attention_scale is not None
    return {
        "attention_bias": cfg.out_bias,
        "query_pre_attn_scalar": round(cfg.attention_scale**-2),
        "final_logit_softcapping": cfg.logits_cap,
        "attn_logit_softcapping": cfg.attention_cap,
        "sliding_window": one_of(cfg.windows),
    }


def refuse(facts: Facts) -> None:
    if facts.flag("use_bidirectional_attention"):
        raise facts.error("use_bidirectional_attention is not supported: attention is causal")


# ---------------------------------------------------------------- gemma3_text


def windows_gemma3(facts: Facts) -> Windows:
    return windows_by_type(facts, facts.size("sliding_window_pattern"))


def read_gemma3(facts: Facts) -> dict[str, Any]:
    """Layers with a window have a rope of their own, `rope_local_base_freq` in transformers 4."""
    given, stretch = facts.get("rope_parameters") or {}, facts.get("rope_scaling") or {}
    full = _rope(facts, {**(given.get(FULL) or {}), **stretch}, "rope_theta")
    local = _rope(facts, given.get(SLIDING) or {}, "rope_local_base_freq")
    ropes = tuple(local if window else full for window in windows_gemma3(facts))
    return read(facts) | {"qk_norm": True, "rope": full, "ropes": ropes}


def _rope(facts: Facts, parameters: dict[str, Any], theta: str) -> Rope:
    plain = {"rope_scaling": None, "rope_parameters": parameters, "rope_theta": facts.get(theta)}
    alone = dataclasses.replace(facts, given={**facts.given, **plain})
    return read_rope(alone, facts.size("max_position_embeddings"))


def write_gemma3(cfg: ModelConfig) -> dict[str, Any]:
    local = next((r for r, w in zip(cfg.ropes, cfg.windows, strict=True) if w and r), cfg.rope)
    return write(cfg) | {
        "rope_parameters": {FULL: write_rope(cfg.rope), SLIDING: write_rope(local)}
    }


def refuse_gemma3(facts: Facts) -> None:
    refuse(facts)
    if facts.get("attn_logit_softcapping") is not None:
        raise facts.error("attn_logit_softcapping: transformers ignores it; expected null")


FAMILIES = (
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma 2",
        COMMON,
        lambda facts: read(facts) | {"attention_cap": _cap(facts, "attn_logit_softcapping")},
        write,
        functools.partial(windows_by_type, every=2),
        types_told,
        SANDWICH,
        refuse,
        renamed={"hidden_act": "hidden_activation"},
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma 3 (text)",
        {
            **COMMON,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        read_gemma3,
        write_gemma3,
        windows_gemma3,
        types_told,
        SANDWICH,
        refuse_gemma3,
        renamed={"hidden_act": "hidden_activation"},
    ),
)
