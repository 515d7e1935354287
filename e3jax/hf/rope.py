"""Rotary position embeddings of config.json, in the forms of transformers 4 and 5 <-> Rope."""

import math
from typing import Any

from e3jax.hf.facts import Facts
from e3jax.models.config import ModelConfig, Rope

# The fields of Rope that each kind uses, beside theta.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
    "longrope": ("original_max_position", "attention_factor", "short_factors", "long_factors"),
}


def read_partial(facts: Facts) -> dict[str, Any]:
    """`rope`, and of a model that turns only part of a head's numbers how many, `turned`."""
    parameters = parameters_of(facts)
    part = parameters.get("partial_rotary_factor", facts.get("partial_rotary_factor"))
    head_dim = facts.size(
        "head_dim", facts.size("hidden_size") // facts.size("num_attention_heads")
    )
    turned = head_dim if part is None else int(head_dim * part)
    rope = read_rope(facts, facts.size("max_position_embeddings"), partial=True)
    return {"rope": rope, "turned": None if turned == head_dim else turned}


def write_partial(cfg: ModelConfig) -> dict[str, Any]:
    part = cfg.rope_dim / cfg.head_dim
    return {"rope_parameters": {**write_rope(cfg.rope), "partial_rotary_factor": part}}


def parameters_of(facts: Facts) -> dict[str, Any]:
    """The rope's own object in config.json, by its name in transformers 4 or 5."""
    given = facts.get("rope_scaling") or facts.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise facts.error(f"rope parameters are {given!r}; expected an object")
    return given


def read_rope(facts: Facts, max_position: int, *, partial: bool = False) -> Rope:
    """Rotary embedding of config.json, resolved, so that the decoder needs nothing else.

    transformers 4 has `rope_theta` and `rope_scaling` (with `rope_type`, or `type` before 4.43);
    transformers 5 has `rope_parameters`. What they leave open is decided as
    transformers.modeling_rope_utils does. partial: the model may turn a part of each head. Raises
    UserError on an unknown type.
    """
    given = parameters_of(facts)
    nested = [key for key, value in given.items() if isinstance(value, dict)]
    if nested:
        raise facts.error(f"rope parameters by layer type ({nested}) are not supported")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise facts.error(
            f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}"
        )
    part = given.get("partial_rotary_factor", facts.get("partial_rotary_factor"))
    if part not in (None, 1) and not partial:
        raise facts.error(f"partial_rotary_factor is {part}; only 1 is supported")
    rope = Facts(given, {}, f"{facts.where}: rope type {kind}")
    # Where a file has it beside the rope keys too, transformers lets that one win.
    original = rope.number("original_max_position_embeddings", max_position)
    original = int(facts.number("original_max_position_embeddings", original))
    values: dict[str, Any] = {}
    if kind == "longrope":
        factor = rope.number("factor", max_position / original)
        wide = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        values = {
            "attention_factor": rope.number("attention_factor", wide),
            "short_factors": _factors(rope, "short_factor"),
            "long_factors": _factors(rope, "long_factor"),
        }
    elif kind != "default":
        # Only yarn can do without a factor: it is then how much longer the context has become.
        values["factor"] = rope.number(
            "factor", max_position / original if kind == "yarn" else None
        )
    if kind == "dynamic":  # stretches from the length in config.json, never from an "original" one
        values["original_max_position"] = max_position
    elif kind in ("llama3", "yarn", "longrope"):
        values["original_max_position"] = original
    if kind == "llama3":
        values |= {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        values |= {
            "beta_fast": rope.number("beta_fast", 32),
            "beta_slow": rope.number("beta_slow", 1),
            "attention_factor": _yarn_attention_factor(given, values["factor"]),
            "truncate": bool(given.get("truncate", True)),
        }
    theta = rope.number("rope_theta", facts.number("rope_theta", 10_000.0))
    return Rope(kind=kind, theta=theta, **values)


def _factors(rope: Facts, key: str) -> tuple[float, ...]:
    given = rope.get(key)
    if not isinstance(given, list) or not all(isinstance(x, int | float) and x > 0 for x in given):
        raise rope.error(f"{key} is {given!r}; expected a list of numbers above 0")
    return tuple(map(float, given))


def _yarn_attention_factor(given: dict[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return magnitude(factor, given["mscale"]) / magnitude(factor, given["mscale_all_dim"])
    return magnitude(factor)


def magnitude(factor: float, scale: float = 1.0) -> float:
    """0.1 s ln(factor) + 1 of a context `factor` times as long (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of transformers 5. A dynamic rope has its context in config.json itself."""
    given = {"rope_type": rope.kind, "rope_theta": rope.theta}
    given |= {field: getattr(rope, field) for field in ROPE_FIELDS[rope.kind]}
    original = given.pop("original_max_position", None)
    if original is not None and rope.kind != "dynamic":
        given["original_max_position_embeddings"] = original
    if rope.kind == "longrope":
        given["short_factor"] = list(given.pop("short_factors"))
        given["long_factor"] = list(given.pop("long_factors"))
    return given
