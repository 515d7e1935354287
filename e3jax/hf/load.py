"""A Hugging Face checkpoint -> sharded parameters. Strict, and each process reads only its part."""

import functools
import logging
import pathlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import files
from e3jax.errors import UserError
from e3jax.hf.families import read_config, read_json
from e3jax.hf.safetensors import DTYPES, Stored, read_header
from e3jax.hf.tensors import EMBED, HEAD, Tensor, tensor_table
from e3jax.models import decoder
from e3jax.models.config import ModelConfig

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a checkpoint of these families is made of; no pickles, no code, no other frameworks.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.md"]
HUB_FILES += ["LICENSE*", "NOTICE*"]
# Mistral's repositories hold the weights a second time under this name; folders hold other formats.
HUB_IGNORED = ["consolidated*", "*/*"]
HARMLESS = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that old llama checkpoints stored


def resolve(path: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a checkpoint: an existing one, `demo` (the bundled model), or a hub id.

    A hub id is downloaded to the Hugging Face cache. Raises UserError when it is none of them.
    """
    if (folder := _local(path)) is not None:
        return folder
    import huggingface_hub  # slow to import, and most runs are offline

    try:
        found = huggingface_hub.snapshot_download(
            path, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED
        )
    except Exception as error:
        raise _not_fetched(path, error) from None
    return pathlib.Path(found)


def resolve_config(path: str, revision: str | None = None) -> pathlib.Path:
    """The config.json of a checkpoint, without its weights: a folder's, or the hub's alone.

    Where the hub cannot be reached, the bundled facts of the models in configs/, with a line that
    says so. Raises UserError when it is none of them.
    """
    if (folder := _local(path)) is not None:
        return folder / "config.json"
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(path, "config.json", revision=revision))
    except Exception as error:
        facts = files.bundled(f"configs/models/{path.replace('/', '--')}.json")
        if not facts.is_file():
            raise _not_fetched(path, error) from None
        log.warning("%s: the hub could not be reached; using the bundled %s", path, facts.name)
        return facts


def _local(path: str) -> pathlib.Path | None:
    """The folder of a checkpoint that is here, or None for what may be a hub id."""
    folder = files.bundled("demo/model" if path == "demo" else path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder")
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path == "demo":
        raise UserError(f"{path}: not a folder; expected a checkpoint folder, `demo` or a hub id")
    return None


def _not_fetched(path: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(
        f"{path}: there is no such folder, and as a Hugging Face hub id it could not be "
        f"fetched ({type(error).__name__}: {reason}). "
        "Give an existing folder, or check the id, the revision, access and the network"
    )


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
            + (f", only {_listed(loose)}" if loose else "")
            + "; expected a safetensors checkpoint (pickled weights are not read)"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map: expected tensor name -> file name")
    paths = {name: inside(folder, name) for name in sorted(set(weight_map.values()))}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise UserError(f"{folder}: shards named by {INDEX} are missing: {_listed(absent)}")
    shards = {name: _file_tensors(path) for name, path in paths.items()}
    found = [(name, t) for shard in shards.values() for name, t in shard.items()]
    count = Counter(name for name, _ in found)
    _raise_problems(
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


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _raise_problems(folder: pathlib.Path, problems: dict[str, list[str]]) -> None:
    lines = [f"  {what}: {_listed(names)}" for what, names in problems.items() if names]
    if lines:
        raise UserError(
            "\n".join([f"{folder}: this is not a sound checkpoint of its config.json:", *lines])
        )


def match(folder: pathlib.Path, cfg: ModelConfig) -> list[tuple[Tensor, Stored]]:
    """The model's tensors and where each lies.

    Tied models may store the embedding, the head, or both if they are equal. Raises UserError that
    lists all unknown, missing, wrongly shaped and unreadable tensors at once.
    """
    stored = stored_tensors(folder)
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
    _raise_problems(
        folder,
        {
            "unknown": [n for n in stored if n not in wanted and not HARMLESS.fullmatch(n)],
            "missing": [n for n in wanted if n not in stored],
            "wrong shape": [
                f"{t.name} {list(s.shape)} (expected {list(t.shape)})"
                for t, s in both
                if s.shape != t.shape
            ],
            "dtype not supported (only F32, F16, BF16; quantised weights are not yet)": [
                f"{t.name} {s.code}" for t, s in both if s.code not in DTYPES
            ],
        },
    )
    return both


def _same(a: Stored, b: Stored, rows: int = 4096) -> bool:
    """Whether two stored tensors are equal bit for bit."""
    if (a.path, a.start) == (b.path, b.start):
        return True
    if (a.code, a.shape) != (b.code, b.shape) or a.code not in DTYPES:
        return False
    x, y = a.array(), b.array()
    return all(
        x[i : i + rows].tobytes() == y[i : i + rows].tobytes() for i in range(0, len(x), rows)
    )


def source_dtype(folder: str | pathlib.Path) -> str:
    """The dtype of most of the checkpoint's bytes: `bfloat16`, `float16` or `float32`."""
    size: Counter[str] = Counter()
    for t in stored_tensors(pathlib.Path(folder)).values():
        size[t.code] += t.nbytes
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
    name = facts.get("dtype") or facts.get("torch_dtype") or "float32"
    known = [dtype.name for dtype in DTYPES.values()]
    if name not in known:
        raise UserError(f"{config}: dtype {name!r}; expected one of {', '.join(known)}")
    return name


def load_params(
    folder: str | pathlib.Path, cfg: ModelConfig | None = None, dtype: Any = None
) -> decoder.Params:
    """Parameters of a checkpoint, sharded as `decoder.abstract_params` says under the mesh set.

    dtype None = `source_dtype`. One leaf at a time; of each tensor only the part that this
    process's devices hold is read. Raises UserError on anything that is not exactly the model of
    config.json, and on NaN or infinite weights, naming the tensors.
    """
    folder = pathlib.Path(folder)
    cfg = read_config(folder) if cfg is None else cfg
    pieces: dict[tuple[str, ...], list[tuple[Tensor, Stored]]] = {}
    for tensor, stored in match(folder, cfg):
        pieces.setdefault(tensor.leaf, []).append((tensor, stored))
    not_finite: list[str] = []

    def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = pieces[tuple(key.key for key in path)]

        def read(index: Any) -> np.ndarray:
            return _read(parts, leaf, index)

        if leaf.sharding is None:
            array = jnp.asarray(read((slice(None),) * len(leaf.shape)))
        else:
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
        finite = np.atleast_1d(np.asarray(_finite(array, parts[0][0].layer is not None)))
        not_finite.extend(t.name for (t, _), ok in zip(parts, finite, strict=True) if not ok)
        return array

    abstract = decoder.abstract_params(cfg, jnp.dtype(dtype or source_dtype(folder)))
    params = jax.tree_util.tree_map_with_path(load, abstract)
    _raise_problems(folder, {"NaN or infinite weights": not_finite})
    return params


def _read(
    parts: list[tuple[Tensor, Stored]], leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """The slice `index` of a leaf, from the tensors that it is made of."""
    first, stored = parts[0]
    with np.errstate(over="ignore"):  # what overflows the dtype is told by its name later
        if first.layer is None:
            return first.to_ours(stored.array())[index].astype(leaf.dtype)
        chosen = parts[index[0]]
        inner = [len(range(n)[cut]) for n, cut in zip(leaf.shape[1:], index[1:], strict=True)]
        stack = np.empty((len(chosen), *inner), leaf.dtype)
        for row, (tensor, stored) in zip(stack, chosen, strict=True):
            row[...] = tensor.to_ours(stored.array())[index[1:]]
    return stack


@functools.partial(jax.jit, static_argnums=1)
def _finite(leaf: jax.Array, stacked: bool) -> jax.Array:
    """Whether all is finite, for each layer where stacked. On the devices: every process knows."""
    return jnp.isfinite(leaf).all(axis=tuple(range(stacked, leaf.ndim)))


def check_vocabulary(tokenizer_folder: str | pathlib.Path, cfg: ModelConfig) -> None:
    """Raises UserError when tokenizer.json has an id that the model has no embedding for.

    A vocabulary padded past the tokenizer's is as it should be. Reads only tokenizer.json.
    """
    path = pathlib.Path(tokenizer_folder) / "tokenizer.json"
    if not path.is_file():
        return
    file = read_json(path)
    vocab = file.get("model", {}).get("vocab", {})
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [token["id"] for token in file.get("added_tokens", [])]
    if ids and max(ids) >= cfg.vocab_size:
        raise UserError(
            f"{path}: has token id {max(ids)}, and the model's vocabulary is {cfg.vocab_size} "
            "(ids 0 .. vocab_size - 1): this tokenizer is not of this model"
        )
