"""Phi-3, 3.5 and 4 (arXiv 2404.14219, 2412.08905, 2503.01743): llama with joined matrices."""

import dataclasses
from typing import Any

from e3jax.hf.facts import NAMES, Facts, Family, one_window
from e3jax.hf.family.llama import COMMON
from e3jax.hf.rope import read_partial, write_partial
from e3jax.models.config import ModelConfig

JOINED = {
    **NAMES,
    **dict.fromkeys("qkv", "self_attn.qkv_proj.weight"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj.weight"),
}


def read(facts: Facts) -> dict[str, Any]:
    """Files from before longrope had its name call it su, or yarn."""
    for key in ("rope_scaling", "rope_parameters"):
        given = facts.get(key)
        names = {"rope_type", "type"} & set(given or ())
        if given and {given[name] for name in names} & {"su", "yarn"}:
            renamed = {**given, **dict.fromkeys(names, "longrope")}
            facts = dataclasses.replace(facts, given={**facts.given, key: renamed})
    return read_partial(facts)


def write(cfg: ModelConfig) -> dict[str, Any]:
    return write_partial(cfg) | {
        "original_max_position_embeddings": cfg.rope.original_max_position or cfg.max_position,
        "sliding_window": cfg.windows[0],
    }


FAMILIES = (
    Family(
        "phi3",
        "Phi3ForCausalLM",
        "Phi-3, Phi-4, Phi-4-mini",
        {
            **COMMON,
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        read,
        write,
        one_window,
        tensors=JOINED,
    ),
)
