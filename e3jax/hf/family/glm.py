"""GLM-4-0414 (https://huggingface.co/zai-org/GLM-4-9B-0414): norms around attention and mlp; and
GLM-4.5 (arXiv 2508.06471): experts chosen as DeepSeek-V3 does."""

import dataclasses
from typing import Any

from e3jax.hf.facts import NAMES, Facts, Family
from e3jax.hf.family import deepseek
from e3jax.hf.family.llama import COMMON
from e3jax.hf.rope import read_partial, write_partial
from e3jax.models.config import ModelConfig


def read(facts: Facts) -> dict[str, Any]:
    found = read_partial(facts)
    rope = dataclasses.replace(found["rope"], interleaved=True)
    return found | {"rope": rope, "norms": "around", "qkv_bias": facts.flag("attention_bias")}


def write(cfg: ModelConfig) -> dict[str, Any]:
    return write_partial(cfg) | {"attention_bias": cfg.qkv_bias}


def read_moe(facts: Facts) -> dict[str, Any]:
    found = read_partial(facts) | deepseek.read_grouped(facts)
    qk_norm = facts.flag("use_qk_norm")
    return found | {"qkv_bias": facts.flag("attention_bias"), "qk_norm": qk_norm}


def write_moe(cfg: ModelConfig) -> dict[str, Any]:
    found = write_partial(cfg) | deepseek.write_experts(cfg)
    return found | {"attention_bias": cfg.qkv_bias, "use_qk_norm": cfg.qk_norm}


FAMILIES = (
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        "GLM-4.5, 4.6",
        {
            **COMMON,
            "vocab_size": 151552,
            "intermediate_size": 10944,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "attention_bias": False,
            "use_qk_norm": False,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        read_moe,
        write_moe,
        told=deepseek.told,
        drafts="num_nextn_predict_layers",
    ),
    Family(
        "glm4",
        "Glm4ForCausalLM",
        "GLM-4-0414",
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
