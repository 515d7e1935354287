"""config.json of a model made of some of another one's layers; families we cannot load included.

Layer numbers change with a cut, so whatever tells layers apart must change with them. What is not
understood for certain is refused.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from e3jax.errors import UserError
from e3jax.hf.families import FAMILIES, from_hf

DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
QUANTIZATION = ("quantization_config", "quantization", "compression_config")

# The keys of transformers' configurations, and of the custom ones that vLLM knows, by what they
# mean. An entry a layer:
PER_LAYER = {
    "layer_types", "mlp_layer_types", "indexer_types", "attn_type_list", "layers_block_type",
    "hybrid_layer_pattern", "hybrid_override_pattern", "compress_ratios", "no_rope_layers",
    "moe_layer_freq", "sparse_attention_freq", "sparse_disable_index_value", "block_configs",
}  # fmt: skip
# Numbers of layers, counted from 0:
NUMBERS = {"mlp_only_layers"}
# The layers before this one are of another kind than the rest:
FIRST = {"max_window_layers", "first_k_dense_replace", "num_dense_layers", "num_hash_layers"}
# Every n-th layer is of another kind, which an irregular stack cannot say; 1 is all of them.
EVERY = {"decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "expert_interval"}
# What only makes the list named where config.json has none:
MADE_FROM = {
    "full_attention_interval": "layer_types",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "index_topk_freq": "indexer_types",
    "index_topk_pattern": "indexer_types",
}
# Architectures whose code makes such a list by itself: https://github.com/huggingface/transformers
NEEDED = dict.fromkeys(("gemma2", "gemma3_text", "cohere2", "gpt_oss", "qwen3_next"), "layer_types")
NEEDED |= {"smollm3": "no_rope_layers"}
# Not about where a layer stands, though the name may sound so:
OTHER = re.compile(
    r".*(layer_?norm|layer_scale|layerdrop|_freq_factor|base_freq|_per_layer_input)|mtp_|qk_layer"
    r"|num_nextn_predict_layers|.*(_token_ids?|_tokens)$|architectures$|num_mtp_layers$"
)
SUSPICIOUS = re.compile(r"layer|pattern|interval|period|freq|every|_step$|scale_depth")


def cut_config(config: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """config.json of the model made of layers `keep`: every per-layer field cut with them.

    Keeps the form (transformers 4 or 5) and all other keys as they are, but for `auto_map`: code
    is not carried. Raises UserError where a cut cannot be expressed, or where it is not certain
    what a key means.
    """
    depth = depth_of(config)
    if not keep or not all(0 <= i < depth for i in keep):
        raise UserError(f"kept layers {list(keep)}: expected some of 0 .. {depth - 1}")
    given = {key: value for key, value in config.items() if key != "auto_map"}
    quantized = {key: given.pop(key) for key in QUANTIZATION if key in given}
    cut = _cut_known(given, keep) if is_known(given) else _cut_other(given, keep)
    kept = with_drafts(config, keep)
    return cut | {key: cut_names(value, kept, key) for key, value in quantized.items()}


def is_known(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a family that can be loaded (its weights may be quantised)."""
    family = FAMILIES.get(config.get("model_type", ""))
    return family is not None and config.get("architectures") in (None, [family.architecture])


def depth_of(config: dict[str, Any]) -> int:
    """Layers of the model that a config.json describes. Raises UserError when it does not tell."""
    told = {config[key] for key in DEPTH if isinstance(config.get(key), int)}
    if not told and is_known(config):
        return from_hf(config, "config.json").num_layers
    if len(told) != 1:
        nested = [k for k, v in config.items() if isinstance(v, dict) and set(DEPTH) & set(v)]
        what = f"a model of several parts ({', '.join(nested)})" if nested else f"depths {told}"
        raise UserError(f"config.json: {what}: expected one stack, with num_hidden_layers")
    return told.pop()


def with_drafts(config: dict[str, Any], keep: Sequence[int]) -> list[int]:
    """`keep`, and the layers that follow the last one and only draft tokens (DeepSeek's MTP)."""
    depth = depth_of(config)
    return [*keep, *range(depth, depth + (config.get("num_nextn_predict_layers") or 0))]


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json that names the dtype of its weights.

    transformers 5 writes `dtype`, 4 wrote `torch_dtype`: the form that is there is kept.
    """
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, dtype)


def _cut_known(config: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """What was told by a layer's number is told layer by layer now, where anything is: numbers
    change, and a removed layer may leave a pattern irregular.
    """
    cfg = from_hf(config, "config.json")
    cut = {
        key: [value[i] for i in keep] if _is_per_layer(key, value, cfg.num_layers) else value
        for key, value in config.items()
    }
    cut["num_hidden_layers"] = len(keep)
    if config.get("model_type") != cfg.family and "model_type" in config:
        cut["model_type"] = cfg.family  # of which it was another name
    told = FAMILIES[cfg.family].told
    before, after = told(cfg), told(cfg.take_layers(keep))
    plain = told(dataclasses.replace(cfg, windows=(None,) * cfg.num_layers, dense=(), ropes=()))
    cut |= {key: after[key] for key in after if key in config or before[key] != plain[key]}
    if from_hf(cut, "config.json") != cfg.take_layers(keep):
        raise UserError(
            f"config.json: a {cfg.family} model of layers {list(keep)} cannot be written down"
        )
    return cut


def _is_per_layer(key: str, value: Any, num_layers: int) -> bool:
    """Lists as long as the model is deep are per layer, but for those that only happen to be."""
    other = key == "architectures" or key.endswith(("_token_id", "_token_ids", "_tokens"))
    return isinstance(value, list) and len(value) == num_layers and not other


def _cut_other(config: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Any other family, by the keys of the tables above."""
    depth, kept, kind = depth_of(config), with_drafts(config, keep), config.get("model_type")
    needed = NEEDED.get(kind or "")
    if needed and config.get(needed) is None:
        raise UserError(
            f"config.json: {kind} without {needed} makes it from the layers' numbers, which change;"
            f" save the config once with transformers 5, which writes {needed}"
        )
    lengths = (depth, depth + len(kept) - len(keep))

    def value_of(key: str, value: Any, beside: dict[str, Any]) -> Any:
        if key in DEPTH:
            return len(keep)
        if key in PER_LAYER and isinstance(value, list | str) and value:
            if len(value) not in lengths:
                raise UserError(
                    f"config.json: {key} has {len(value)} entries and there are {depth} layers"
                )
            parts = [value[i] for i in kept if i < len(value)]
            return "".join(parts) if isinstance(value, str) else parts
        if key in NUMBERS and value:
            return [keep.index(i) for i in value if i in keep]
        if key in FIRST and isinstance(value, int):
            return sum(i < value for i in keep)
        if key in EVERY and value in (None, 1):
            return value
        if key in MADE_FROM and beside.get(MADE_FROM[key]) is not None:
            return value
        if isinstance(value, dict):
            if set(DEPTH) & set(value):
                raise UserError(f"config.json: {key} is a model of its own; expected one stack")
            skip = key.startswith("rope_") or key.endswith("2label") or key == "label2id"
            return value if skip else {k: value_of(k, v, value) for k, v in value.items()}
        as_deep = isinstance(value, list) and len(value) in lengths
        if (as_deep or (value and SUSPICIOUS.search(key))) and not OTHER.match(key):
            raise UserError(
                f"config.json: {key}={value!r} of {kind} seems to tell layers apart, and it is not "
                "known how it changes when layers are removed"
            )
        return value

    return {key: value_of(key, value, config) for key, value in config.items()}


# ---------------------------------------------------------------- names of layers in other places

# As a module is named, `model.layers.3.mlp`, and in a regular expression, `model\.layers\.3\.`.
LAYER = re.compile(r"(?<!mtp\.)(?<!mtp\\\.)(?<!\w)(?:layers|layer|h|blocks)\\?\.(\d+)(?!\d)")
PATTERN = re.compile(r"(re|[+-]):")  # of compressed-tensors and gptq


def cut_names(value: Any, keep: Sequence[int], where: str) -> Any:
    """A JSON value with the layers that its strings and keys name renumbered, or dropped.

    Raises UserError on a pattern whose numbers may be layers and are not plainly one.
    """
    name = _renamer(keep, where)
    if isinstance(value, str):
        return name(value)
    if isinstance(value, list):
        parts = [cut_names(v, keep, where) for v in value]
        return [part for part, v in zip(parts, value) if part is not None or v is None]
    if isinstance(value, dict):
        items = {name(k): (v, cut_names(v, keep, f"{where}.{k}")) for k, v in value.items()}
        return {k: new for k, (old, new) in items.items() if k and (new is not None or old is None)}
    return value


def _renamer(keep: Sequence[int], where: str) -> Callable[[str], str | None]:
    def rename(text: str) -> str | None:
        found = list(LAYER.finditer(text))
        if PATTERN.match(text):
            plain = re.sub(r"\\d|\[0-9\]", "", text)
            numbered = re.search(r"(?<![A-Za-z0-9_])\d", plain)
            if len(found) > 1 or (not found and numbered) or (found and "|" in text):
                raise UserError(
                    f"config.json: {where}: the pattern {text!r} may name layers by number, and "
                    "cannot be renumbered for certain; write a name for each layer"
                )
        if not found:
            return text
        begin, end = found[0].span(1)
        if text[end : end + 1] == "*":
            raise UserError(
                f"config.json: {where}: {text!r} may name several layers; write one for each"
            )
        old = int(text[begin:end])
        return f"{text[:begin]}{keep.index(old)}{text[end:]}" if old in keep else None

    return rename
