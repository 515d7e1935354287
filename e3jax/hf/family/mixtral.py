"""Mixtral (arXiv 2401.04088) and OLMoE (arXiv 2409.02060)."""

from typing import Any

from e3jax.hf.facts import NAMES, Facts, Family, one_window
from e3jax.hf.family.llama import COMMON
from e3jax.models.config import Experts, ModelConfig


def read_mixtral(facts: Facts) -> dict[str, Any]:
    experts = Experts(
        count=facts.size("num_local_experts"),
        per_token=facts.size("num_experts_per_tok"),
        width=facts.size("intermediate_size"),
    )
    return {"experts": experts}


def write_mixtral(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.experts is not None
    return {
        "num_local_experts": cfg.experts.count,
        "num_experts_per_tok": cfg.experts.per_token,
        "sliding_window": cfg.windows[0],
    }


def read_olmoe(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    experts = Experts(
        count=facts.size("num_experts"),
        per_token=facts.size("num_experts_per_tok"),
        width=facts.size("intermediate_size"),
        normalised=facts.flag("norm_topk_prob"),
    )
    clip = None if facts.get("clip_qkv") is None else facts.number("clip_qkv")
    found = {"experts": experts, "qk_norm": "whole", "qkv_clip": clip}
    return found | {"qkv_bias": bias, "out_bias": bias}


def write_olmoe(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.experts is not None
    return {
        "num_experts": cfg.experts.count,
        "num_experts_per_tok": cfg.experts.per_token,
        "norm_topk_prob": cfg.experts.normalised,
        "attention_bias": cfg.out_bias,
        "clip_qkv": cfg.qkv_clip,
    }


FAMILIES = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "Mixtral 8x7B, 8x22B",
        {
            **COMMON,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        read_mixtral,
        write_mixtral,
        one_window,
        tensors={
            **NAMES,
            "router": "block_sparse_moe.gate.weight",
            "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
            "expert_down": "block_sparse_moe.experts.{}.w2.weight",
            "expert_up": "block_sparse_moe.experts.{}.w3.weight",
        },
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        "OLMoE",
        {
            **COMMON,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "norm_topk_prob": False,
        },
        read_olmoe,
        write_olmoe,
    ),
)
