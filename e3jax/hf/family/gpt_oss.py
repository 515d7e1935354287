"""gpt-oss (arXiv 2508.10925): experts with biases in MXFP4, attention sinks, windows in turns."""

from typing import Any

from e3jax.hf.facts import FULL, NAMES, SLIDING, Facts, Family, Windows, check_types, types_told
from e3jax.hf.family.llama import COMMON
from e3jax.models.config import Experts, ModelConfig


def read(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    experts = Experts(
        count=facts.size("num_local_experts"),
        per_token=facts.size("num_experts_per_tok"),
        width=facts.size("intermediate_size"),
        scores="softmax of chosen",
        joined=True,
        limit=facts.number("swiglu_limit"),
    )
    return {"experts": experts, "sinks": True, "qkv_bias": bias, "out_bias": bias}


def write(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.experts is not None
    return {
        "num_local_experts": cfg.experts.count,
        "num_experts_per_tok": cfg.experts.per_token,
        "swiglu_limit": cfg.experts.limit,
        "attention_bias": cfg.out_bias,
        "sliding_window": max((w for w in cfg.windows if w), default=None),
    }


def windows(facts: Facts) -> Windows:
    """As `layer_types` says; without it every other layer has the window, the first one too."""
    layers = facts.size("num_hidden_layers")
    types = facts.get("layer_types") or [(SLIDING, FULL)[i % 2] for i in range(layers)]
    check_types(facts, types)
    return tuple(facts.size("sliding_window") if t == SLIDING else None for t in types)


def refuse(facts: Facts) -> None:
    if facts.get("swiglu_alpha") not in (None, 1.702):
        raise facts.error(f"swiglu_alpha={facts.get('swiglu_alpha')} is not supported, only 1.702")


FAMILIES = (
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss 20b and 120b",
        {
            **COMMON,
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        read,
        write,
        windows,
        types_told,
        {
            **NAMES,
            "sink_bias": "self_attn.sinks",
            "router": "mlp.router.weight",
            "router_bias": "mlp.router.bias",
            "expert_in": "mlp.experts.gate_up_proj",
            "expert_in_bias": "mlp.experts.gate_up_proj_bias",
            "expert_out": "mlp.experts.down_proj",
            "expert_out_bias": "mlp.experts.down_proj_bias",
        },
        refuse,
    ),
)
