"""Qwen2 and 2.5 (arXiv 2407.10671, 2412.15115), Qwen3 (arXiv 2505.09388), and their experts."""

from typing import Any

from e3jax.hf.facts import FULL, NAMES, SLIDING, Facts, Family, one_window, typed_windows
from e3jax.hf.family.llama import COMMON
from e3jax.models.config import Experts, ModelConfig

DENSE = {
    **COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
SPARSE = {
    **COMMON,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}


def read_qwen3(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    return {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}


def windows_told(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "layer_types": [SLIDING if window else FULL for window in cfg.windows],
        "max_window_layers": cfg.windows.count(None),
    }


def write_windows(cfg: ModelConfig) -> dict[str, Any]:
    window = max((w for w in cfg.windows if w), default=None)
    return {"sliding_window": window, "use_sliding_window": window is not None}


def write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    return write_windows(cfg) | {"attention_bias": cfg.out_bias}


# ---------------------------------------------------------------- mixtures of experts


def read_experts(facts: Facts) -> dict[str, Any]:
    """`mlp_only_layers`, and where layers have experts only every so many: the others are dense."""
    count, step = facts.size("num_hidden_layers"), facts.size("decoder_sparse_step")
    dense = set(facts.get("mlp_only_layers") or ())
    dense |= {i for i in range(count) if (i + 1) % step}
    renamed = "num_local_experts" in facts.given  # as transformers 5 writes qwen3_moe
    experts = Experts(
        count=facts.size("num_local_experts" if renamed else "num_experts"),
        per_token=facts.size("num_experts_per_tok"),
        width=facts.size("moe_intermediate_size"),
        normalised=facts.flag("norm_topk_prob"),
        shared_width=facts.size("shared_expert_intermediate_size", 0, least=0),
        shared_gate=facts.size("shared_expert_intermediate_size", 0, least=0) > 0,
    )
    return {"experts": experts, "dense": tuple(sorted(dense))}


def write_experts(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.experts is not None
    found = {
        "num_experts": cfg.experts.count,
        "num_experts_per_tok": cfg.experts.per_token,
        "moe_intermediate_size": cfg.experts.width,
        "norm_topk_prob": cfg.experts.normalised,
    }
    if cfg.experts.shared_width:
        found["shared_expert_intermediate_size"] = cfg.experts.shared_width
    return found


def dense_told(cfg: ModelConfig) -> dict[str, Any]:
    return {"mlp_only_layers": list(cfg.dense), "decoder_sparse_step": 1}


def refuse_qwen2_moe(facts: Facts) -> None:
    if facts.flag("use_sliding_window") and facts.get("layer_types") is None:
        raise facts.error(
            "use_sliding_window without layer_types: releases of transformers disagree which "
            "layers of qwen2_moe have the window; write layer_types"
        )


FAMILIES = (
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen1.5, Qwen2, Qwen2.5",
        DENSE,
        lambda _: {"qkv_bias": True},
        write_windows,
        typed_windows,
        windows_told,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3 (dense)",
        {**DENSE, "head_dim": 128, "attention_bias": False},
        read_qwen3,
        write_qwen3,
        typed_windows,
        windows_told,
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        {
            **SPARSE,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "qkv_bias": True,
        },
        lambda facts: {"qkv_bias": facts.flag("qkv_bias"), **read_experts(facts)},
        lambda cfg: write_windows(cfg) | write_experts(cfg) | {"qkv_bias": cfg.qkv_bias},
        typed_windows,
        lambda cfg: windows_told(cfg) | dense_told(cfg),
        {
            **NAMES,
            "shared_gate": "mlp.shared_expert.gate_proj.weight",
            "shared_up": "mlp.shared_expert.up_proj.weight",
            "shared_down": "mlp.shared_expert.down_proj.weight",
            "shared_router": "mlp.shared_expert_gate.weight",
        },
        refuse_qwen2_moe,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3-30B-A3B, 235B-A22B, Coder",
        {
            **SPARSE,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
        lambda facts: read_qwen3(facts) | read_experts(facts),
        lambda cfg: write_qwen3(cfg) | write_experts(cfg),
        lambda facts: (
            one_window(facts)
            if facts.flag("use_sliding_window")
            else (None,) * facts.size("num_hidden_layers")
        ),
        dense_told,
    ),
)
