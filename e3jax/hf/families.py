"""config.json <-> ModelConfig, for every family.

A family is a row of FAMILIES: the values transformers takes for keys that config.json leaves out,
and how its sliding windows are told. The tensors of all of them are in tensors.py.
"""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from e3jax.errors import UserError
from e3jax.hf.rope import positive, read_rope, write_rope
from e3jax.models.config import ACTIVATIONS, ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells one architecture from another.

    `defaults` are those of transformers' config class: a key absent from config.json means them.
    `windows`: no layer has a sliding window, all have the same one, or `layer_types` tells.
    """

    architecture: str
    defaults: dict[str, Any]
    windows: Literal["none", "all", "layer_types"] = "none"


COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN = {
    **COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {
            **COMMON,
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            **COMMON,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windows="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", QWEN, windows="layer_types"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN, "head_dim": 128, "attention_bias": False},
        windows="layer_types",
    ),
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder or of a config.json. Raises UserError."""
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() else path
    return from_hf(read_json(path), str(path))


def from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """config.json, in the form of transformers 4 or 5, as a ModelConfig.

    `where` names the file in messages. Raises UserError on an architecture, a rope type or a value
    that is not supported.
    """
    family = _family(config, where)
    facts = {**family.defaults, **config}

    def size(key: str, default: int | None = None) -> int:
        value = default if facts.get(key) is None else facts[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} is {value!r}; expected a whole number above 0")
        return value

    width, num_heads = size("hidden_size"), size("num_attention_heads")
    num_kv_heads = size("num_key_value_heads", num_heads)
    head_dim = size("head_dim", width // num_heads)
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim is {head_dim}; rotary embeddings need an even one")
    if facts["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act {facts['hidden_act']!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    attention_bias = "attention_bias" in family.defaults and bool(facts["attention_bias"])
    return ModelConfig(
        family=config["model_type"],
        num_layers=size("num_hidden_layers"),
        width=width,
        mlp_width=size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        max_position=size("max_position_embeddings"),
        norm_eps=positive(facts, "rms_norm_eps", where),
        tied=bool(facts["tie_word_embeddings"]),
        windows=_windows(facts, family, size, where),
        rope=read_rope(config, size("max_position_embeddings"), where),
        activation=facts["hidden_act"],
        qkv_bias=config["model_type"] == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias="mlp_bias" in family.defaults and bool(facts["mlp_bias"]),
        qk_norm=config["model_type"] == "qwen3",
    )


def _family(config: dict[str, Any], where: str) -> Family:
    """The family, or UserError with the reason why the model is refused."""
    supported = ", ".join(FAMILIES)
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {name!r} is not supported; supported: {supported} (dense)"
        )
    family = FAMILIES[name]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"{where}: architectures is {architectures}; a {name} language model is "
            f"[{family.architecture!r}], and other heads are not supported"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UserError(
            f"{where}: quantization_config ({method}): quantised weights are not supported yet; "
            "use the checkpoint in bfloat16, float16 or float32"
        )
    if config.get("per_layer_config"):
        raise UserError(f"{where}: per_layer_config: layers of different shapes are not supported")
    if name == "mistral" and config.get("layer_types") is not None:
        raise UserError(
            f"{where}: mistral with layer_types is the ministral architecture, which is not "
            f"supported; supported: {supported}"
        )
    return family


def _windows(facts: dict[str, Any], family: Family, size: Any, where: str) -> tuple:
    """Sliding window of each layer in tokens, None = full attention."""
    num_layers = size("num_hidden_layers")
    if family.windows == "none" or facts["sliding_window"] is None:
        window = None
    else:
        window = size("sliding_window")
    if family.windows != "layer_types":
        return (window,) * num_layers
    if not facts["use_sliding_window"]:
        window = None
    types = facts.get("layer_types")
    if types is None:
        first = facts["max_window_layers"] if window is not None else num_layers
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(types) != num_layers:
        raise UserError(
            f"{where}: layer_types has {len(types)} entries and num_hidden_layers is {num_layers}"
        )
    unknown = sorted(set(types) - {FULL, SLIDING})
    if unknown:
        raise UserError(
            f"{where}: layer_types {unknown} not supported; supported: {FULL}, {SLIDING}"
        )
    if window is None and SLIDING in types:
        raise UserError(
            f"{where}: layer_types has {SLIDING} and no window is in force; expected "
            "use_sliding_window true and a sliding_window"
        )
    return tuple(window if t == SLIDING else None for t in types)


def to_hf(
    cfg: ModelConfig,
    *,
    bos: int | None = None,
    eos: int | list[int] | None = None,
    pad: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """config.json, in the form of transformers 5, of a model that has no source checkpoint.

    Raises UserError where the family cannot express `cfg`.
    """
    family = FAMILIES[cfg.family]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": cfg.family,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": cfg.activation,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_position,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "rope_parameters": write_rope(cfg.rope),
        "use_cache": True,
    }
    biases = {"attention_bias": cfg.out_bias, "mlp_bias": cfg.mlp_bias}
    config |= {key: value for key, value in biases.items() if key in family.defaults}
    window = max((w for w in cfg.windows if w), default=None)
    if family.windows != "none":
        config["sliding_window"] = window
    if family.windows == "layer_types":
        config["use_sliding_window"] = window is not None
        config["layer_types"] = [SLIDING if w else FULL for w in cfg.windows]
        config["max_window_layers"] = cfg.windows.count(None)
    if from_hf(config, "config.json") != cfg:
        raise UserError(f"a {cfg.family} config.json cannot express {cfg}")
    return config
