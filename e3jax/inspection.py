"""`inspect`: how a checkpoint, or a config.json alone, is understood. Without jax."""

import collections
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from e3jax.errors import UserError
from e3jax.hf import hub
from e3jax.hf.cut import cut_config, depth_of
from e3jax.hf.families import FAMILIES, from_hf, read_json
from e3jax.hf.folders import INDEX, SINGLE, match, stored_tensors
from e3jax.models.config import ModelConfig
from e3jax.models.params import active_params, count_params

CUT = 0.25  # of the layers: the paper's headline


def inspect(path: str) -> tuple[list[str], bool]:
    """Lines for people about a folder, a config.json, `demo` or a hub id; and whether the model can
    be searched and recovered. Raises UserError where there is no config.json to read."""
    given = pathlib.Path(path).expanduser()
    file = given if given.is_file() else hub.resolve_config(path)
    config = read_json(file)
    lines = [str(file)]
    try:
        cfg = from_hf(config, file.name)
    except UserError as error:
        return [*lines, *_refused(config, str(error))], False
    lines += _described(cfg, config)
    try:
        lines.append(row("weights", _weights(file.parent, cfg)))
    except UserError as error:
        return [*lines, row("weights", str(error))], False
    return lines, True


def row(name: str, text: str) -> str:
    """A name, and beside it a text that goes on below itself."""
    first, rest = f"  {name:<14} ", " " * 17
    return textwrap.fill(
        text, 96, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _refused(config: dict, reason: str) -> Iterator[str]:
    yield row("model_type", str(config.get("model_type")))
    yield row("not supported", reason)
    try:
        depth = depth_of(config)
        cut_config(config, spread(depth, kept(depth)))
    except UserError as error:
        yield row("copying", f"export --from-mask cannot cut it either: {error}")
        return
    yield row(
        "copying",
        f"export --from-mask can write some of its {depth} layers, which a mask of yours names",
    )


def _described(cfg: ModelConfig, config: dict) -> Iterator[str]:
    """What the configuration says, and what a cut saves."""
    yield row("family", f"{cfg.family} ({FAMILIES[cfg.family].architecture})")
    yield row("layers", f"{cfg.num_layers}: {', '.join(_kinds(cfg))}")
    yield row("attention", _attention(cfg))
    yield row("feed-forward", _feed_forward(cfg))
    rope = cfg.rope
    stretched = "" if rope.kind == "default" else f", {rope.kind} x {rope.factor:g}"
    yield row("positions", f"rotary, theta {rope.theta:g}{stretched}, up to {cfg.max_position:,}")
    tied = "tied to the embedding" if cfg.tied else "a matrix of its own"
    yield row("vocabulary", f"{cfg.vocab_size:,}, the head {tied}")
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method")
        yield row("stored as", f"{method} in blocks; dequantised when it is read, exported whole")
    if (key := FAMILIES[cfg.family].drafts) and config.get(key):
        yield row("left out", f"{config[key]} layer(s) behind the last that draft tokens ({key})")
    yield row("parameters", size_of(cfg))
    keep = spread(cfg.num_layers, kept(cfg.num_layers))
    cut = cfg.take_layers(keep)
    saved = 1 - count_params(cut) / count_params(cfg)
    yield row(
        f"{CUT:.0%} removed",
        f"{cfg.num_layers} -> {len(keep)} layers, {size_of(cut)} parameters ({saved:.1%} fewer); "
        f"in bfloat16 {short(2 * count_params(cfg))}B -> {short(2 * count_params(cut))}B; cache "
        f"{short(cache_of(cfg))}B -> {short(cache_of(cut))}B a token; ideal speed-up "
        f"{cfg.num_layers / len(keep):.2f}x",
    )


def kept(depth: int) -> int:
    """Layers that stay of `depth` when CUT of them goes."""
    return max(1, depth - round(CUT * depth))


def spread(depth: int, count: int) -> list[int]:
    """`count` of `depth` layers, evenly: which ones a search keeps is not known before it."""
    return [i * depth // count for i in range(count)]


def _kinds(cfg: ModelConfig) -> Iterator[str]:
    windows = collections.Counter(cfg.windows)
    if len(windows) > 1 or None not in windows:
        for window, count in windows.items():
            what = "see everything" if window is None else f"see {window:,} tokens back"
            yield f"{count} {what}"
    if cfg.experts is not None:
        sparse = cfg.num_layers - len(cfg.dense)
        yield f"{sparse} with experts"
        if cfg.dense:
            yield f"{len(cfg.dense)} without ({numbers(cfg.dense)})"
    elif len(windows) == 1:
        yield "all alike"


def numbers(layers: Sequence[int]) -> str:
    """Layer numbers, those that follow each other as a range."""
    parts: list[list[int]] = []
    for i in layers:
        if parts and parts[-1][-1] == i - 1:
            parts[-1].append(i)
        else:
            parts.append([i])
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _attention(cfg: ModelConfig) -> str:
    if (latent := cfg.latent) is not None:
        queries = "" if latent.q_rank is None else f", queries from {latent.q_rank}"
        return (
            f"latent: {cfg.num_heads} heads of {latent.nope_dim} + {latent.rope_dim} turned, "
            f"values of {latent.value_dim}, from {latent.kv_rank} numbers a token{queries}"
        )
    also = [
        name
        for name, has in (
            ("biases", cfg.qkv_bias),
            ("norms of queries and keys", bool(cfg.qk_norm)),
        )
        if has
    ]
    heads = f"{cfg.num_heads} heads of {cfg.head_dim}, {cfg.num_kv_heads} of keys and values"
    return ", ".join([heads, *also])


def _feed_forward(cfg: ModelConfig) -> str:
    plain = f"{cfg.width:,} -> {cfg.mlp_width:,}, {cfg.activation}"
    if (experts := cfg.experts) is None:
        return plain
    text = (
        f"{experts.count} experts of {experts.width:,}, {experts.per_token} a token by "
        f"{experts.scores}"
    )
    if experts.groups > 1:
        text += f", from {experts.groups_taken} of {experts.groups} groups"
    if experts.shared_width:
        text += f", and {experts.shared_width:,} that all share"
    return text + (f"; without experts {plain}" if cfg.dense else "")


def size_of(cfg: ModelConfig) -> str:
    """Parameters, and those that a token meets where they are fewer."""
    total, active = count_params(cfg), active_params(cfg)
    return short(total) + (f" ({short(active)} a token)" if active < total else "")


def short(count: float) -> str:
    """Four digits and a unit."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K")):
        if count >= unit:
            return f"{count / unit:.4g}{name}"
    return f"{count:.4g} "


def cache_of(cfg: ModelConfig) -> float:
    """Bytes a token that decoding keeps in bfloat16."""
    return 2 * cfg.cached_width * cfg.num_layers


def _weights(folder: pathlib.Path, cfg: ModelConfig) -> str:
    """What lies beside config.json. Raises UserError where it is not sound."""
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return "none beside config.json"
    match(folder, cfg)
    stored = stored_tensors(folder).values()
    files, codes = {t.path for t in stored}, {t.code for t in stored}
    total = sum(t.nbytes for t in stored)
    return (
        f"{len(stored):,} tensors in {count_of(files, 'file')}, {', '.join(sorted(codes))}, "
        f"{short(total)}B: all that config.json asks for, by name, shape and type"
    )


def count_of(things: Iterable, name: str) -> str:
    number = len(list(things))
    return f"{number} {name}{'' if number == 1 else 's'}"
