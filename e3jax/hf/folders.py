"""A checkpoint's folder: which one, what it holds, where each tensor lies. Strict; without jax."""

import dataclasses
import logging
import math
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from e3jax.errors import UserError
from e3jax.hf import dequantise
from e3jax.hf.families import FAMILIES, read_json
from e3jax.hf.safetensors import DTYPES, Stored, read_header
from e3jax.hf.tensors import EMBED, HEAD, Piece, Tensor, tensor_table
from e3jax.models.config import ModelConfig

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HARMLESS = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that old llama checkpoints stored


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of file `name` of a folder. Raises UserError when it would lie elsewhere.

    A folder of the hub's cache holds links to `blobs` beside `snapshots`, and those are followed.
    """
    path = folder / name
    homes = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        homes.append(folder.resolve().parents[1] / "blobs")
    if pathlib.PurePath(name).name != name or path.resolve().parent not in homes:
        raise UserError(f"{folder}: {name!r} points outside the folder, and is not followed")
    return path


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint of one file, or of shards with an index, by name.

    Names that the metadata record as an alias (`safetensors.torch.save_model`) are there too.
    Raises UserError on missing, broken or outside files, and on an index that does not agree.
    """
    if (folder / SINGLE).exists():
        return _file_tensors(inside(folder, SINGLE))
    if not (folder / INDEX).exists():
        loose = sorted(p.name for p in folder.glob("*.safetensors")) or sorted(
            p.name for p in folder.glob("*.bin")
        )
        raise UserError(
            f"{folder}: neither {SINGLE} nor {INDEX}"
            + (f", only {listed(loose)}" if loose else "")
            + "; expected a safetensors checkpoint (pickled weights are not read)"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map: expected tensor name -> file name")
    paths = {name: inside(folder, name) for name in sorted(set(weight_map.values()))}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise UserError(f"{folder}: shards named by {INDEX} are missing: {listed(absent)}")
    shards = {name: _file_tensors(path) for name, path in paths.items()}
    found = [(name, t) for shard in shards.values() for name, t in shard.items()]
    count = Counter(name for name, _ in found)
    raise_problems(
        folder,
        {
            "duplicate (in several shards)": [n for n, times in count.items() if times > 1],
            f"not in the shard that {INDEX} names": [
                n for n, file in weight_map.items() if n not in shards[file]
            ],
            f"in a shard but not in {INDEX}": [  # an alias, whose own name differs, need not be
                n for n, t in found if n not in weight_map and n == t.name
            ],
        },
    )
    return dict(found)


def _file_tensors(path: pathlib.Path) -> dict[str, Stored]:
    tensors, metadata = read_header(path)
    aliases = {
        alias: tensors[name]
        for alias, name in metadata.items()
        if alias not in tensors and name in tensors
    }
    return {**tensors, **aliases}


def listed(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def raise_problems(folder: pathlib.Path, problems: dict[str, list[str]]) -> None:
    lines = [f"  {what}: {listed(names)}" for what, names in problems.items() if names]
    if lines:
        raise UserError(
            "\n".join([f"{folder}: this is not a sound checkpoint of its config.json:", *lines])
        )


def match(folder: pathlib.Path, cfg: ModelConfig) -> list[tuple[Tensor, Stored]]:
    """The model's tensors and where each lies.

    Tied models may store the embedding, the head, or both if they are equal. Layers that only draft
    tokens ahead are left out, and a line says so. Raises UserError that lists all unknown, missing,
    wrongly shaped and unreadable tensors at once.
    """
    stored = _without_drafts(dequantise.with_scales(stored_tensors(folder)), folder, cfg)
    if cfg.tied and HEAD in stored:
        head = stored.pop(HEAD)
        embed = stored.setdefault(EMBED, head)
        if not _same(embed, head):
            raise UserError(
                f"{folder}: config.json ties {HEAD} to {EMBED}, but both are stored and differ; "
                "set tie_word_embeddings to false, or remove the one that is not meant"
            )
    wanted = {t.name: t for t in tensor_table(cfg)}
    both = [(t, stored[t.name]) for t in wanted.values() if t.name in stored]
    raise_problems(
        folder,
        {
            "unknown": [n for n in stored if n not in wanted and not HARMLESS.fullmatch(n)],
            "missing": [n for n in wanted if n not in stored],
            "wrong shape": [
                f"{t.name} {list(s.shape)} (expected {list(t.shape)})"
                for t, s in both
                if s.shape != t.shape
            ],
            "dtype not supported (only F32, F16, BF16, and F8_E4M3 or MXFP4 with scales)": [
                f"{t.name} {s.code}" for t, s in both if not _is_readable(t, s)
            ],
        },
    )
    return both


def _without_drafts(
    stored: dict[str, Stored], folder: pathlib.Path, cfg: ModelConfig
) -> dict[str, Stored]:
    key = FAMILIES[cfg.family].drafts
    config = read_json(folder / "config.json") if key else {}
    count = config.get(key) or 0
    behind = tuple(f"model.layers.{cfg.num_layers + i}." for i in range(count))
    left = {name: where for name, where in stored.items() if not name.startswith(behind)}
    if len(left) < len(stored):
        log.info(
            "%s: %d layer(s) behind the last one only draft tokens ahead (%s) and are left out",
            folder,
            count,
            key,
        )
    return left if behind else stored


def _is_readable(tensor: Tensor, stored: Stored) -> bool:
    if stored.scale is None:
        return stored.code in DTYPES
    return dequantise.is_sound(stored) and len(tensor.pieces) == 1


def in_pieces(tensor: Tensor, stored: Stored) -> Iterator[tuple[Piece, Stored]]:
    """The pieces of the parameters that a stored tensor is, and where each lies."""
    if stored.scale is not None:
        (piece,) = tensor.pieces
        yield piece, stored
        return
    start = stored.start
    for piece in tensor.pieces:
        nbytes = math.prod(piece.split) * DTYPES[stored.code].itemsize
        yield piece, dataclasses.replace(stored, start=start, nbytes=nbytes, shape=piece.split)
        start += nbytes


def _same(a: Stored, b: Stored, step: int = 2**24) -> bool:
    """Whether two stored tensors are equal bit for bit."""
    if (a.path, a.start) == (b.path, b.start):
        return True
    if (a.code, a.shape) != (b.code, b.shape) or a.code not in DTYPES:
        return False
    return all(a.read(i, step) == b.read(i, step) for i in range(0, a.nbytes, step))


def source_dtype(folder: str | pathlib.Path) -> str:
    """The dtype of most of the checkpoint's bytes: `bfloat16`, `float16` or `float32`."""
    size: Counter[str] = Counter()
    stored = dequantise.with_scales(stored_tensors(pathlib.Path(folder))).values()
    for t in stored:
        size[t.code] += t.nbytes
    if any(t.scale is not None for t in stored):
        return "bfloat16"  # what it is dequantised to
    code = max(size, key=lambda c: size[c], default="no tensors")
    if code not in DTYPES:
        raise UserError(f"{folder}: stored as {code}; expected one of {', '.join(DTYPES)}")
    return DTYPES[code].name


def planned_dtype(config: pathlib.Path) -> str:
    """The stored dtype of the checkpoint of a config.json: `source_dtype` where the weights are
    there, else what config.json says of them. Raises UserError."""
    if any((config.parent / name).is_file() for name in (SINGLE, INDEX)):
        return source_dtype(config.parent)
    facts = read_json(config)
    if facts.get("quantization_config"):
        return "bfloat16"
    name = facts.get("dtype") or facts.get("torch_dtype") or "float32"
    known = [dtype.name for dtype in DTYPES.values()]
    if name not in known:
        raise UserError(f"{config}: dtype {name!r}; expected one of {', '.join(known)}")
    return name
