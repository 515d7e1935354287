"""config.json <-> ModelConfig, for every family.

A family is a file in family/: its facts, and the names of its tensors. What is here is common.
"""

import importlib
import json
import pathlib
import pkgutil
from typing import Any

from e3jax.errors import UserError
from e3jax.hf import dequantise
from e3jax.hf import family as files_of_families
from e3jax.hf.facts import Facts, Family
from e3jax.hf.rope import read_rope, write_rope
from e3jax.models.config import ACTIVATIONS, ModelConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in pkgutil.iter_modules(files_of_families.__path__, "e3jax.hf.family.")
    for family in importlib.import_module(module.name).FAMILIES
}


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
    facts = Facts(config, family.defaults, where, family.renamed)
    family.refuse(facts)
    width, num_heads = facts.size("hidden_size"), facts.size("num_attention_heads")
    if facts.get("hidden_act") not in ACTIVATIONS:
        raise facts.error(
            f"{facts.name('hidden_act')} {facts.get('hidden_act')!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    fields = {
        "family": family.exported_as or family.name,
        "num_layers": facts.size("num_hidden_layers"),
        "width": width,
        "mlp_width": facts.size("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": facts.size("num_key_value_heads", num_heads),
        "head_dim": facts.size("head_dim", width // num_heads),
        "vocab_size": facts.size("vocab_size"),
        "max_position": facts.size("max_position_embeddings"),
        "norm_eps": facts.number("rms_norm_eps"),
        "tied": facts.flag("tie_word_embeddings"),
        "windows": family.windows(facts),
        "activation": facts.get("hidden_act"),
    }
    fields |= family.read(facts)
    if "rope" not in fields:
        fields["rope"] = read_rope(facts, facts.size("max_position_embeddings"))
    if num_heads % fields["num_kv_heads"]:
        raise facts.error(
            f"num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {fields['num_kv_heads']}"
        )
    if fields["head_dim"] % 2:
        raise facts.error(f"head_dim is {fields['head_dim']}; rotary embeddings need an even one")
    cfg = ModelConfig(**fields)
    planes = {len(f) for f in (cfg.rope.short_factors, cfg.rope.long_factors) if f}
    if cfg.rope_dim % 2 or planes - {cfg.rope_dim // 2}:
        raise facts.error(
            f"{cfg.rope_dim} numbers of a head are rotated, in pairs, and there are factors for "
            f"{sorted(planes) or 'all'}; expected an even number, and a factor for each pair"
        )
    return cfg


def _family(config: dict[str, Any], where: str) -> Family:
    """The family, or UserError with the reason why the model is refused."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"{where}: architectures is {architectures}; a {name} language model is "
            f"[{family.architecture!r}], and other heads are not supported"
        )
    if (quantized := config.get("quantization_config")) and not dequantise.is_read(quantized):
        method = quantized.get("quant_method", "unknown method")
        raise UserError(
            f"{where}: quantization_config ({method}): these quantised weights are not read, only "
            "fp8 in blocks and mxfp4; use the checkpoint in bfloat16, float16 or float32"
        )
    if config.get("per_layer_config"):
        raise UserError(f"{where}: per_layer_config: layers of different shapes are not supported")
    return family


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
    config = {family.renamed.get(key, key): value for key, value in config.items()}
    config |= family.write(cfg) | family.told(cfg)
    if from_hf(config, "config.json") != cfg:
        raise UserError(f"a {cfg.family} config.json cannot express {cfg}")
    return config
