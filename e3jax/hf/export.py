"""Parameters -> a Hugging Face checkpoint: written aside, read back, verified, then renamed.

The folder is there whole and verified, or not at all. Tensors are fetched one at a time, so the
host needs room for a few of them and never for the model.
"""

import contextlib
import errno
import functools
import glob
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from e3jax.errors import UserError
from e3jax.hf import safetensors
from e3jax.hf.families import cut_config, read_config, read_json, to_hf
from e3jax.hf.load import INDEX, SINGLE, inside, match, source_dtype
from e3jax.hf.tensors import Tensor, tensor_table
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params

SHARD_BYTES = 5 * 10**9
# Carried on byte for byte from the source.
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "chat_template*")
SOURCE_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")

Verify = Callable[[pathlib.Path], None]


def export(
    params: Params,
    keep: Sequence[int],
    cfg: ModelConfig,
    source_folder: str | pathlib.Path,
    out_folder: str | pathlib.Path,
    *,
    card: str,
    dtype: str = "source",
    shard_bytes: int = SHARD_BYTES,
    verify: Verify | None = None,
) -> pathlib.Path:
    """Writes the model made of layers `keep` of the checkpoint `source_folder`; returns its folder.

    params, cfg: the pruned model (`take_layers` done); keep: its layers' numbers in the source.
    dtype: float32, float16, bfloat16, or `source` = as the source is stored. card: README.md.
    verify: called with the finished folder before it gets its name; what it raises undoes all.
    Raises UserError when the output folder is not empty, the disk too small, a weight not finite
    or what was read back not what was written.
    """
    source = pathlib.Path(source_folder)
    dtype = source_dtype(source) if dtype == "source" else dtype
    config = cut_config(read_json(source / "config.json"), keep)
    # transformers 5 writes `dtype`, 4 wrote `torch_dtype`: the source's own form is kept.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(keys, dtype)
    files = _carried(source, SOURCE_FILES) | {"config.json": _json(config), "README.md": card}
    return _write(
        params, cfg, files, pathlib.Path(out_folder).absolute(), dtype, shard_bytes, verify
    )


def export_new(
    params: Params,
    cfg: ModelConfig,
    tokenizer_folder: str | pathlib.Path,
    out_folder: str | pathlib.Path,
    *,
    card: str,
    bos: int | None = None,
    eos: int | list[int] | None = None,
    pad: int | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    verify: Verify | None = None,
) -> pathlib.Path:
    """Writes a model trained from scratch, with the tokenizer it was trained on. As `export`.

    bos, eos, pad: ids of the special tokens, for config.json and generation_config.json.
    """
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    files = _carried(pathlib.Path(tokenizer_folder), TOKENIZER_FILES) | {
        "config.json": _json(to_hf(cfg, bos=bos, eos=eos, pad=pad, dtype=dtype)),
        "generation_config.json": _json({k: v for k, v in ids.items() if v is not None}),
        "README.md": card,
    }
    return _write(
        params, cfg, files, pathlib.Path(out_folder).absolute(), dtype, shard_bytes, verify
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _carried(source: pathlib.Path, patterns: Sequence[str]) -> dict[str, bytes | str]:
    paths = {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}
    return {path.name: inside(source, path.name).read_bytes() for path in sorted(paths)}


def _write(
    params: Params,
    cfg: ModelConfig,
    files: dict[str, bytes | str],
    out: pathlib.Path,
    dtype: str,
    shard_bytes: int,
    verify: Verify | None,
) -> pathlib.Path:
    """Shards, index and `files`; read back; verify; rename. Collective: process 0 writes."""
    first = jax.process_index() == 0
    file_type = jnp.dtype(dtype)
    if file_type not in safetensors.CODES:
        known = ", ".join(t.name for t in safetensors.CODES)
        raise UserError(f"export.dtype is {dtype}; expected one of {known}")
    content = {name: b.encode() if isinstance(b, str) else b for name, b in files.items()}
    table = tensor_table(cfg)
    shards = _shards(table, file_type.itemsize, shard_bytes)
    if first:
        weights = sum(t.size for t in table) * file_type.itemsize
        # A tensor's entries in header and index: 200 bytes each are plenty.
        _check_room(out, weights + 400 * len(table) + sum(map(len, content.values())))
    with _aside(out) as folder:
        for name, tensors in shards.items():
            arrays = _pieces(params, tensors, file_type)
            if first:
                layout = [(t.name, t.shape) for t in tensors]
                hf = (t.to_hf(x) for t, x in zip(tensors, arrays, strict=True))
                safetensors.write_file(folder / name, layout, file_type, hf)
            else:  # the pieces are gathered by all
                for _ in arrays:
                    pass
        if len(shards) > 1:
            content[INDEX] = _index(shards, file_type.itemsize).encode()
        if first:
            for name, data in content.items():
                _write_synced(folder / name, data)
            _sync(folder)
        _barrier("written")
        _read_back(folder, params, cfg, table, file_type)
        if verify is not None:
            verify(folder)
    return out


def _shards(table: Sequence[Tensor], itemsize: int, most: int) -> dict[str, list[Tensor]]:
    """File name -> its tensors, in the order of the network, each file at most `most` bytes.

    A tensor that is larger than that alone gets a file of its own.
    """
    groups: list[list[Tensor]] = [[]]
    size = 0
    for t in table:
        nbytes = t.size * itemsize
        if groups[-1] and size + nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _index(shards: dict[str, list[Tensor]], itemsize: int) -> str:
    size = sum(t.size for tensors in shards.values() for t in tensors)
    return _json(
        {
            "metadata": {"total_parameters": size, "total_size": size * itemsize},
            "weight_map": {t.name: name for name, tensors in shards.items() for t in tensors},
        }
    )


def _pieces(params: Params, tensors: Sequence[Tensor], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The piece of the parameters that each tensor is, on the host, one at a time."""
    for t in tensors:
        leaf: Any = functools.reduce(lambda tree, key: tree[key], t.leaf, params)
        piece = leaf if t.layer is None else _layer(leaf, t.layer)
        if not piece.is_fully_addressable:
            piece = multihost_utils.process_allgather(piece, tiled=True)
        with np.errstate(over="ignore"):  # what overflows is told below
            array = np.asarray(piece).astype(dtype)
        if not np.isfinite(array).all():
            raise UserError(f"{t.name}: NaN or infinite in {dtype.name}; nothing was exported")
        yield array


@jax.jit
def _layer(leaf: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _read_back(
    folder: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    table: Sequence[Tensor],
    dtype: np.dtype,
) -> None:
    """Compares the folder with the model, bit for bit, through the loader's own reading."""
    if read_config(folder) != cfg:
        raise UserError(f"the exported config.json says {read_config(folder)}, the model is {cfg}")
    stored = {t.name: s for t, s in match(folder, cfg)}
    for t, written in zip(table, _pieces(params, table, dtype), strict=True):
        if t.to_ours(stored[t.name].array()).tobytes() != written.tobytes():
            raise UserError(f"{t.name}: read back from the disk, it is not what was written")


def _check_room(out: pathlib.Path, needed: int) -> None:
    """Raises UserError when the output folder is in use or its disk is too small."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; give another folder or remove it")
    disk = next(p for p in (out, *out.parents) if p.is_dir())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(f"{out}: needs {needed:,} bytes and {disk} has {free:,} free; make room")


@contextlib.contextmanager
def _aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside `out` that becomes it at the end, or vanishes on any failure."""
    first = jax.process_index() == 0
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    prefix = f".{out.name}.partial-"
    partial = out.parent / f"{prefix}{token:08x}"
    try:
        if first:
            _make_folder(partial, stale=f"{glob.escape(prefix)}*")
        yield partial
        _barrier("verified")
        if first:
            partial.replace(out)  # over an empty folder too
            _sync(partial.parent)
        _barrier("renamed")
    except BaseException as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: the disk is full; nothing was left behind") from error
        raise


def _make_folder(folder: pathlib.Path, stale: str) -> None:
    """Makes the folder, and removes those beside it that a killed run left (pattern `stale`)."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(stale):
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{folder.parent}: cannot write there ({error.strerror})") from None


def _write_synced(path: pathlib.Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: pathlib.Path) -> None:
    """A file's name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {name}")
