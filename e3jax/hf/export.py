"""Parameters -> a Hugging Face checkpoint: written aside, read back, verified, then renamed.

The folder is there whole and verified, or not at all. Tensors are fetched one at a time, so the
host needs room for a few of them and never for the model.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh, processes
from e3jax.errors import UserError
from e3jax.hf import aside, blocks, safetensors
from e3jax.hf.aside import SHARD_BYTES, to_json
from e3jax.hf.cut import QUANTIZATION, cut_config, with_dtype
from e3jax.hf.families import FAMILIES, read_config, read_json, to_hf
from e3jax.hf.folders import match, source_dtype
from e3jax.hf.tensors import Tensor, tensor_table
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.progress import over

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
    config = with_dtype(pruned_config(source, keep), dtype)
    files = aside.carried(source) | {"config.json": to_json(config), "README.md": card.encode()}
    return _write(
        params, cfg, files, pathlib.Path(out_folder).absolute(), dtype, shard_bytes, verify
    )


def pruned_config(source: pathlib.Path, keep: Sequence[int]) -> dict[str, Any]:
    """config.json of layers `keep` of what was loaded: weights are dequantised, and no layer drafts
    tokens ahead."""
    config = cut_config(read_json(source / "config.json"), keep)
    drafts = FAMILIES[config["model_type"]].drafts
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION}
    return plain | {drafts: 0} if drafts in plain else plain


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
    files = aside.carried(pathlib.Path(tokenizer_folder), aside.TOKENIZER_FILES) | {
        "config.json": to_json(to_hf(cfg, bos=bos, eos=eos, pad=pad, dtype=dtype)),
        "generation_config.json": to_json({k: v for k, v in ids.items() if v is not None}),
        "README.md": card.encode(),
    }
    return _write(
        params, cfg, files, pathlib.Path(out_folder).absolute(), dtype, shard_bytes, verify
    )


def _write(
    params: Params,
    cfg: ModelConfig,
    files: dict[str, bytes],
    out: pathlib.Path,
    dtype: str,
    shard_bytes: int,
    verify: Verify | None,
) -> pathlib.Path:
    """Shards, index and `files`; read back; verify; rename. Collective: process 0 writes."""
    first = processes.is_first()
    file_type = jnp.dtype(dtype)
    if file_type not in safetensors.CODES:
        known = ", ".join(t.name for t in safetensors.CODES)
        raise UserError(f"export.dtype is {dtype}; expected one of {known}")
    code, itemsize = safetensors.CODES[file_type], file_type.itemsize
    table = tensor_table(cfg)
    shards = aside.shard(table, lambda t: t.size * itemsize, shard_bytes)
    size = sum(t.size for t in table)
    files = files | aside.index(
        {file: [t.name for t in tensors] for file, tensors in shards.items()},
        total_parameters=size,
        total_size=size * itemsize,
    )
    if first:
        # A tensor's entry in a header: 200 bytes are plenty.
        needed = size * itemsize + 200 * len(table) + sum(map(len, files.values()))
        aside.check_room(out, needed)
    with _aside(out) as folder:
        for name, tensors in over("shards written", shards.items(), len(shards)):
            pieces = _pieces(params, tensors, file_type)
            if first:
                layout = [(t.name, code, t.shape, t.size * itemsize) for t in tensors]
                safetensors.write_file(folder / name, layout, (piece for _, piece in pieces))
            else:
                _gather_only(pieces)
        if first:
            aside.write_files(folder, files)
        processes.barrier("written")
        _read_back(folder, params, cfg, table, file_type)
        if verify is not None:
            verify(folder)
    return out


def _pieces(
    params: Params, tensors: Iterable[Tensor], dtype: np.dtype
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The tensors as stored, in contiguous pieces one after the other; one of them on the host.

    Collective: those that are spread over processes are gathered by all, and all go over all.
    """
    for t in tensors:
        for piece in t.pieces:
            leaf: Any = functools.reduce(lambda tree, key: tree[key], piece.leaf, params)
            ours = processes.whole(_at(leaf, piece.index) if piece.index else leaf)
            for cut in blocks.cuts(len(ours), ours[:1].size * dtype.itemsize):
                with np.errstate(over="ignore"):  # what overflows the dtype is told by its name
                    part = ours[cut].astype(dtype, copy=False)
                if not blocks.finite(part):
                    raise UserError(
                        f"{t.name}: NaN or infinite in {dtype.name}; nothing was exported"
                    )
                yield t, part


def _gather_only(pieces: Iterable[Any]) -> None:
    for _ in pieces:
        pass


@jax.jit
def _at(leaf: jax.Array, index: tuple[int, ...]) -> jax.Array:
    for i in index:
        leaf = mesh.entry(leaf, i)
    return leaf


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
    done: dict[str, int] = dict.fromkeys(stored, 0)
    for t, written in _pieces(params, over("tensors read back", table, len(table)), dtype):
        found = stored[t.name].read(done[t.name], written.nbytes)
        done[t.name] += written.nbytes
        if found != memoryview(written.reshape(-1).view(np.uint8)):
            raise UserError(f"{t.name}: read back from the disk, it is not what was written")
    assert all(stored[name].nbytes == size for name, size in done.items())


@contextlib.contextmanager
def _aside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """`aside.aside` by process 0, and its folder for all."""
    token = processes.from_first(aside.new_token)
    with aside.aside(out, token) if processes.is_first() else contextlib.nullcontext():
        yield aside.partial(out, token)
        processes.barrier("verified")
    processes.barrier("renamed")
