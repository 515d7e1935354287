"""StableLM 2 (arXiv 2402.17834) and Nemotron-4 (arXiv 2402.16819): norms about the mean, with a
bias, and a rope that turns a part of each head."""

from typing import Any

from e3jax.hf.facts import Facts, Family
from e3jax.hf.family.llama import COMMON
from e3jax.hf.rope import read_partial, write_partial
from e3jax.models.config import ModelConfig


def read(facts: Facts) -> dict[str, Any]:
    return read_partial(facts) | {"norm": "layer", "norm_bias": True}


def read_stablelm(facts: Facts) -> dict[str, Any]:
    return read(facts) | {
        "qkv_bias": facts.flag("use_qkv_bias"),
        "parallel": facts.flag("use_parallel_residual"),
    }


def write_stablelm(cfg: ModelConfig) -> dict[str, Any]:
    return write_partial(cfg) | {
        "use_qkv_bias": cfg.qkv_bias,
        "use_parallel_residual": cfg.parallel,
    }


def refuse_stablelm(facts: Facts) -> None:
    if facts.flag("qk_layernorm"):
        raise facts.error("qk_layernorm (a norm of its own for each head) is not supported")


def read_nemotron(facts: Facts) -> dict[str, Any]:
    bias = facts.flag("attention_bias")
    return read(facts) | {
        "norm_offset": 1.0,
        "gated": False,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": facts.flag("mlp_bias"),
    }


def write_nemotron(cfg: ModelConfig) -> dict[str, Any]:
    return write_partial(cfg) | {"attention_bias": cfg.out_bias, "mlp_bias": cfg.mlp_bias}


FAMILIES = (
    Family(
        "stablelm",
        "StableLmForCausalLM",
        "StableLM 2",
        {
            **COMMON,
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": False,
            "use_parallel_residual": False,
        },
        read_stablelm,
        write_stablelm,
        refuse=refuse_stablelm,
        renamed={"rms_norm_eps": "layer_norm_eps"},
    ),
    Family(
        "nemotron",
        "NemotronForCausalLM",
        "Nemotron-4, Minitron",
        {
            **COMMON,
            "vocab_size": 256000,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 48,
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
        read_nemotron,
        write_nemotron,
        renamed={"rms_norm_eps": "norm_eps"},
    ),
)
