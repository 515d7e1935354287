"""What tells one architecture from another, and a config.json with its family's defaults.

A family is a file in family/: facts, and the names of its tensors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from e3jax.errors import UserError
from e3jax.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = tuple[int | None, ...]

# Leaf -> tensor of a layer, as llama calls them. `{}` is an expert's number; where several leaves
# have one tensor, they are its rows, one after the other.
NAMES = {
    "attn_norm": "input_layernorm.weight",
    "attn_norm_bias": "input_layernorm.bias",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp_norm_bias": "post_attention_layernorm.bias",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
    "attn_out_norm": "post_attention_layernorm.weight",  # in models without `mlp_norm`
    "mlp_out_norm": "post_feedforward_layernorm.weight",
    "router": "mlp.gate.weight",
    "router_choice_bias": "mlp.gate.e_score_correction_bias",
    "expert_gate": "mlp.experts.{}.gate_proj.weight",
    "expert_up": "mlp.experts.{}.up_proj.weight",
    "expert_down": "mlp.experts.{}.down_proj.weight",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """A config.json, and what transformers takes for the keys that it leaves out."""

    given: Mapping[str, Any]
    defaults: Mapping[str, Any]
    where: str  # names the file in messages
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # llama's keys -> theirs

    def name(self, key: str) -> str:
        """What this family calls a key of llama's."""
        return self.renamed.get(key, key)

    def get(self, key: str) -> Any:
        """The value; one that is there as null is none."""
        key = self.name(key)
        return self.given[key] if key in self.given else self.defaults.get(key)

    def flag(self, key: str) -> bool:
        return bool(self.get(key))

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, `default` where there is none. Raises UserError."""
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(
                f"{self.name(key)} is {value!r}; expected a whole number above {least - 1}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0, `default` where there is none. Raises UserError."""
        value = default if self.get(key) is None else self.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise self.error(f"{self.name(key)} is {value!r}; expected a number above 0")
        return float(value)

    def error(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}")


def no_windows(facts: Facts) -> Windows:
    """Every layer sees everything."""
    return (None,) * facts.size("num_hidden_layers")


def one_window(facts: Facts) -> Windows:
    """`sliding_window` for every layer, or for none where it is null."""
    window = None if facts.get("sliding_window") is None else facts.size("sliding_window")
    return (window,) * facts.size("num_hidden_layers")


def typed_windows(facts: Facts) -> Windows:
    """As `layer_types` says; without it Qwen's rule: from layer `max_window_layers` on."""
    num_layers, types = facts.size("num_hidden_layers"), facts.get("layer_types")
    in_force = facts.get("sliding_window") is not None and facts.flag("use_sliding_window")
    window = facts.size("sliding_window") if in_force else None
    if types is None:
        first = facts.get("max_window_layers") if window is not None else num_layers
        return tuple(window if i >= first else None for i in range(num_layers))
    check_types(facts, types)
    if window is None and SLIDING in types:
        raise facts.error(
            f"layer_types has {SLIDING} and no window is in force; expected use_sliding_window "
            "true and a sliding_window"
        )
    return tuple(window if t == SLIDING else None for t in types)


def windows_by_type(facts: Facts, every: int | None) -> Windows:
    """As `layer_types` says; without it `sliding_window` is for all layers but each `every`-th, or
    for all or none, as `one_window` has it."""
    num_layers, types = facts.size("num_hidden_layers"), facts.get("layer_types")
    if types is None:
        if every is None:
            return one_window(facts)
        types = [SLIDING if (i + 1) % every else FULL for i in range(num_layers)]
    check_types(facts, types)
    return tuple(facts.size("sliding_window") if t == SLIDING else None for t in types)


def types_told(cfg: ModelConfig) -> dict[str, Any]:
    return {"layer_types": [SLIDING if window else FULL for window in cfg.windows]}


def one_of(windows: Windows) -> int | None:
    """`sliding_window` of layers of which some have it."""
    return max((window for window in windows if window), default=None)


def check_types(facts: Facts, types: list[str]) -> None:
    """Raises UserError unless `layer_types` has a known entry for each layer."""
    num_layers = facts.size("num_hidden_layers")
    if len(types) != num_layers:
        raise facts.error(
            f"layer_types has {len(types)} entries and num_hidden_layers is {num_layers}"
        )
    if unknown := sorted(set(types) - {FULL, SLIDING}):
        raise facts.error(f"layer_types {unknown} not supported; supported: {FULL}, {SLIDING}")


def nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of transformers, by what its config.json says beside llama's keys."""

    name: str  # model_type
    architecture: str
    models: str  # some that people know, for docs/families.md
    defaults: Mapping[str, Any]  # of transformers' config class
    read: Callable[[Facts], dict[str, Any]] = nothing  # fields of ModelConfig
    write: Callable[[ModelConfig], dict[str, Any]] = nothing  # their keys
    windows: Callable[[Facts], Windows] = no_windows
    # The keys that tell layers apart, written out, of a model that has some of another's layers.
    told: Callable[[ModelConfig], dict[str, Any]] = nothing
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: NAMES)
    refuse: Callable[[Facts], None] = lambda _: None  # raises UserError
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # llama's keys -> theirs
    exported_as: str = ""  # the model_type of which this is another name
    # The key that counts layers behind the last one which only draft tokens ahead.
    drafts: str = ""
