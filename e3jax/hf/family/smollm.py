"""SmolLM3 (https://huggingface.co/blog/smollm3): llama with some layers without rope."""

from typing import Any

from e3jax.hf.facts import Facts, Family, Windows, typed_windows, types_told
from e3jax.hf.family import llama
from e3jax.hf.family.qwen import write_windows
from e3jax.hf.rope import read_rope
from e3jax.models.config import ModelConfig


def turns(facts: Facts) -> list[bool]:
    """Whether each layer has rope: `no_rope_layers`, where 1 says that it has."""
    num_layers, given = facts.size("num_hidden_layers"), facts.get("no_rope_layers")
    if given is None:
        interval = facts.size("no_rope_layer_interval")
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(given) != num_layers:
        raise facts.error(
            f"no_rope_layers has {len(given)} entries and num_hidden_layers is {num_layers}"
        )
    return [bool(x) for x in given]


def windows(facts: Facts) -> Windows:
    """As `layer_types` says; without it the window is for the layers without rope."""
    if facts.get("layer_types") is not None:
        return typed_windows(facts)
    in_force = facts.get("sliding_window") is not None and facts.flag("use_sliding_window")
    window = facts.size("sliding_window") if in_force else None
    return tuple(None if turned else window for turned in turns(facts))


def read(facts: Facts) -> dict[str, Any]:
    rope = read_rope(facts, facts.size("max_position_embeddings"))
    ropes = tuple(rope if turned else None for turned in turns(facts))
    return llama.read(facts) | {"rope": rope, "ropes": ropes}


def told(cfg: ModelConfig) -> dict[str, Any]:
    ropes = cfg.ropes or (cfg.rope,) * cfg.num_layers
    return types_told(cfg) | {"no_rope_layers": [int(rope is not None) for rope in ropes]}


FAMILIES = (
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        "SmolLM3",
        {
            **llama.COMMON,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "attention_bias": False,
            "mlp_bias": False,
        },
        read,
        lambda cfg: llama.write(cfg) | write_windows(cfg),
        windows,
        told,
    ),
)
