"""DeepSeek-V2 (arXiv 2405.04434), V3 (arXiv 2412.19437) and R1 (arXiv 2501.12948), Kimi K2.

Latent attention, experts in groups, and a few dense layers first. The layers behind the last one
that draft tokens ahead (`num_nextn_predict_layers`) are not part of the model.
"""

import dataclasses
import math
from typing import Any

from e3jax.hf.facts import NAMES, Facts, Family
from e3jax.hf.family.llama import COMMON
from e3jax.hf.rope import magnitude, parameters_of, read_rope, write_rope
from e3jax.models.config import Experts, Latent, ModelConfig

COMMON_V2 = {
    **COMMON,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
}
LATENT_NAMES = {
    **NAMES,
    "q_down": "self_attn.q_a_proj.weight",
    "q_down_norm": "self_attn.q_a_layernorm.weight",
    "q_up": "self_attn.q_b_proj.weight",
    "kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_down_norm": "self_attn.kv_a_layernorm.weight",
    "kv_up": "self_attn.kv_b_proj.weight",
}


def read_latent(facts: Facts) -> dict[str, Any]:
    latent = Latent(
        kv_rank=facts.size("kv_lora_rank"),
        q_rank=None if facts.get("q_lora_rank") is None else facts.size("q_lora_rank"),
        nope_dim=facts.size("qk_nope_head_dim"),
        rope_dim=facts.size("qk_rope_head_dim"),
        value_dim=facts.size("v_head_dim"),
    )
    head_dim = latent.nope_dim + latent.rope_dim
    return {
        "latent": latent,
        "head_dim": head_dim,
        "num_kv_heads": facts.size("num_attention_heads"),
        "attention_scale": _scale(facts, head_dim),
    }


def _scale(facts: Facts, head_dim: int) -> float | None:
    """The scores' factor grows with a rope that is stretched: (0.1 m ln(factor) + 1)^2."""
    given = parameters_of(facts)
    kind = given.get("rope_type") or given.get("type") or "default"
    stretch, factor = given.get("mscale_all_dim"), given.get("factor")
    if kind == "default" or not stretch or not factor:
        return None
    return head_dim**-0.5 * magnitude(factor, stretch) ** 2


def read_experts(facts: Facts) -> dict[str, Any]:
    """What V2 and V3 share."""
    width = facts.size("moe_intermediate_size")
    first = facts.size("first_k_dense_replace", 0, least=0)
    experts = Experts(
        count=facts.size("n_routed_experts"),
        per_token=facts.size("num_experts_per_tok"),
        width=width,
        scale=facts.number("routed_scaling_factor"),
        shared_width=width * facts.size("n_shared_experts", 0, least=0),
    )
    layers = facts.size("num_hidden_layers")
    return {"experts": experts, "dense": tuple(range(min(first, layers)))}


def read_v2(facts: Facts) -> dict[str, Any]:
    if facts.flag("norm_topk_prob"):
        raise facts.error(
            "norm_topk_prob of deepseek_v2: transformers leaves it out; not supported"
        )
    found = read_experts(facts)
    experts = dataclasses.replace(found["experts"], normalised=False)
    method = facts.get("topk_method")
    if method == "group_limited_greedy":
        experts = dataclasses.replace(
            experts, groups=facts.size("n_group"), groups_taken=facts.size("topk_group")
        )
    elif method != "greedy":
        raise facts.error(f"topk_method {method!r}; expected greedy or group_limited_greedy")
    bias = facts.flag("mlp_bias")
    return found | read_latent(facts) | {"experts": experts, "mlp_bias": bias} | _rope(facts, True)


def read_grouped(facts: Facts) -> dict[str, Any]:
    """The experts of V3: sigmoids, a bias that chooses, groups by their best two."""
    found = read_experts(facts)
    experts = dataclasses.replace(
        found["experts"],
        scores="sigmoid",
        normalised=facts.flag("norm_topk_prob"),
        corrected=True,
        groups=facts.size("n_group", 1),
        groups_taken=facts.size("topk_group", 1),
        group_score="two",
    )
    return found | {"experts": experts}


def read_v3(facts: Facts) -> dict[str, Any]:
    turned = _rope(facts, facts.flag("rope_interleave"))
    return read_grouped(facts) | read_latent(facts) | turned


def _rope(facts: Facts, interleaved: bool) -> dict[str, Any]:
    rope = read_rope(facts, facts.size("max_position_embeddings"))
    return {"rope": dataclasses.replace(rope, interleaved=interleaved)}


def write_v3(cfg: ModelConfig) -> dict[str, Any]:
    latent = cfg.latent
    assert latent is not None
    rope = write_rope(cfg.rope)
    if cfg.attention_scale is not None:  # what a stretch of the scores makes of cos and sin too
        stretched = math.sqrt(cfg.attention_scale * cfg.head_dim**0.5)
        rope["mscale_all_dim"] = (stretched - 1.0) / (0.1 * math.log(cfg.rope.factor))
    return {
        "rope_parameters": rope,
        "rope_interleave": cfg.rope.interleaved,
        "num_key_value_heads": cfg.num_heads,
        "head_dim": latent.rope_dim,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
    } | write_experts(cfg)


def write_experts(cfg: ModelConfig) -> dict[str, Any]:
    experts = cfg.experts
    assert experts is not None
    return {
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.width,
        "n_shared_experts": experts.shared_width // experts.width,
        "routed_scaling_factor": experts.scale,
        "norm_topk_prob": experts.normalised,
        "n_group": experts.groups,
        "topk_group": experts.groups_taken,
        "num_nextn_predict_layers": 0,
    }


def write_v2(cfg: ModelConfig) -> dict[str, Any]:
    assert cfg.experts is not None
    found = write_v3(cfg)
    del found["rope_interleave"]
    method = "group_limited_greedy" if cfg.experts.groups > 1 else "greedy"
    return found | {"topk_method": method, "mlp_bias": cfg.mlp_bias}


def refuse(facts: Facts) -> None:
    wanted = {
        "attention_bias": (False, None),
        "moe_layer_freq": (1, None),
        "scoring_func": (
            "softmax" if facts.given["model_type"] == "deepseek_v2" else "sigmoid",
            None,
        ),
    }
    for key, values in wanted.items():
        if facts.get(key) not in values:
            raise facts.error(f"{key}={facts.get(key)!r} is not supported, only {values[0]!r}")


def told(cfg: ModelConfig) -> dict[str, Any]:
    return {"first_k_dense_replace": len(cfg.dense)}


def refuse_v3(facts: Facts) -> None:
    refuse(facts)
    if facts.get("topk_method") not in ("noaux_tc", None):
        raise facts.error(f"topk_method {facts.get('topk_method')!r}; expected noaux_tc")


V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "DeepSeek-V3, V3.1, R1",
    {
        **COMMON_V2,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "moe_intermediate_size": 2048,
        "rope_interleave": True,
    },
    read_v3,
    write_v3,
    told=told,
    tensors=LATENT_NAMES,
    refuse=refuse_v3,
    drafts="num_nextn_predict_layers",
)
KIMI_K2 = dataclasses.replace(V3, name="kimi_k2", models="Kimi K2", exported_as="deepseek_v3")
FAMILIES = (
    V3,
    KIMI_K2,
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "DeepSeek-V2, V2-Lite, Coder-V2",
        {
            **COMMON_V2,
            "vocab_size": 102400,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "first_k_dense_replace": 0,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "moe_intermediate_size": 1407,
            "mlp_bias": False,
        },
        read_v2,
        write_v2,
        told=told,
        tensors=LATENT_NAMES,
        refuse=refuse,
    ),
)
