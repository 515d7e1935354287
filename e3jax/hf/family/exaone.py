"""EXAONE 4 (arXiv 2507.11407): norms after attention and mlp; with windows, no rope without one."""

from typing import Any

from e3jax.hf.facts import Facts, Family, Windows, one_of, types_told, windows_by_type
from e3jax.hf.family.llama import COMMON
from e3jax.hf.rope import read_rope
from e3jax.models.config import ModelConfig


def windows(facts: Facts) -> Windows:
    if facts.get("layer_types") is not None or facts.get("sliding_window") is None:
        return windows_by_type(facts, None)
    pattern = facts.get("sliding_window_pattern")
    if isinstance(pattern, str):
        raise facts.error(
            f"sliding_window_pattern is {pattern!r}: it is not certain what that says of the last "
            "layer; write layer_types"
        )
    return windows_by_type(facts, facts.size("sliding_window_pattern"))


def read(facts: Facts) -> dict[str, Any]:
    found: dict[str, Any] = {"norms": "after", "qk_norm": True}
    if facts.get("sliding_window") is None:
        return found
    rope = read_rope(facts, facts.size("max_position_embeddings"))
    return found | {"ropes": tuple(rope if window else None for window in windows(facts))}


def write(cfg: ModelConfig) -> dict[str, Any]:
    """A window that no layer has says that they are without rope."""
    window = one_of(cfg.windows) or (cfg.max_position if cfg.ropes else None)
    return {"sliding_window": window}


FAMILIES = (
    Family(
        "exaone4",
        "Exaone4ForCausalLM",
        "EXAONE 4",
        {
            **COMMON,
            "vocab_size": 102400,
            "intermediate_size": 16384,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        read,
        write,
        windows,
        types_told,
    ),
)
