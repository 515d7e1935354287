"""Some layers of a checkpoint as a checkpoint of its own, by copying byte ranges.

No model in memory, any dtype, any family: 16 MB of buffers, and no jax.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from e3jax.errors import UserError
from e3jax.hf import aside, safetensors
from e3jax.hf.cut import (
    QUANTIZATION,
    cut_config,
    cut_names,
    depth_of,
    is_known,
    with_drafts,
    with_dtype,
)
from e3jax.hf.families import read_config, read_json
from e3jax.hf.folders import inside, listed, match, source_dtype, stored_tensors
from e3jax.hf.safetensors import Stored
from e3jax.hf.tensors import tensor_table

BUFFER = 8 * 2**20
FLUSH = 256 * 2**20  # bytes between requests to write out what is dirty: the disk never waits
# Where gptq, autoawq and modelopt say beside config.json how the weights are stored.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be written."""

    tensors: tuple[tuple[str, Stored], ...]  # new name, and where the bytes are
    files: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return sum(stored.nbytes for _, stored in self.tensors)


def make_plan(source: pathlib.Path, keep: Sequence[int]) -> Plan:
    """The model made of layers `keep` (ascending) of the checkpoint `source`.

    Raises UserError on an unsound checkpoint, or where the cut cannot be expressed.
    """
    config = read_json(source / "config.json")
    cut = cut_config(config, keep)
    quantized = any(config.get(key) for key in QUANTIZATION)
    if is_known(config) and not quantized:
        cfg = read_config(source)
        found = {t.name: stored for t, stored in match(source, cfg)}
        table = tensor_table(cfg.take_layers(keep))
        tensors = [(t.name, found[t.source_name(keep)]) for t in table]
        cut = with_dtype(cut, source_dtype(source))
    else:
        tensors = _renamed(source, config, keep)
    files = aside.carried(source) | {"config.json": aside.to_json(cut)}
    kept = with_drafts(config, keep)
    for name in QUANTIZATION_FILES:
        if (source / name).is_file():
            value = cut_names(read_json(inside(source, name)), kept, name)
            files[name] = aside.to_json(value)
    return Plan(tuple(tensors), files)


def _renamed(
    source: pathlib.Path, config: dict[str, Any], keep: Sequence[int]
) -> list[tuple[str, Stored]]:
    """The tensors in the order they are stored: those of layers renumbered or left out."""
    stored = stored_tensors(source)
    stack, depth = _stack(source, list(stored), config), depth_of(config)
    kept = with_drafts(config, keep)
    new = {old: i for i, old in enumerate(kept)}
    tensors, beyond = [], []
    for name, where in stored.items():
        if not (layer := re.match(rf"{re.escape(stack)}\.(\d+)\.", name)):
            tensors.append((name, where))
            continue
        old = int(layer[1])
        if old in new:
            tensors.append((f"{stack}.{new[old]}.{name[layer.end() :]}", where))
        elif old >= depth:
            beyond.append(name)
    if beyond:
        raise UserError(
            f"{source}: config.json has {depth} layers, and there are weights of later ones: "
            f"{listed(beyond)}"
        )
    return sorted(tensors, key=lambda t: (t[1].path, t[1].start))


def _stack(source: pathlib.Path, names: Sequence[str], config: dict[str, Any]) -> str:
    """What stands before the layer's number in the names: the one place that has every number."""
    depth, found = depth_of(config), {}
    for name in names:
        if layer := re.match(r"(.*?)\.(\d+)\.", name):
            found.setdefault(layer[1], set()).add(int(layer[2]))
    stacks = [stack for stack, numbers in found.items() if set(range(depth)) <= numbers]
    if len(stacks) != 1:
        ranges = ", ".join(f"{stack} ({len(n)} numbers)" for stack, n in sorted(found.items()))
        raise UserError(
            f"{source}: config.json has {depth} layers; expected one stack of tensors with all of "
            f"their numbers, found {ranges or 'no numbers at all'}"
        )
    return stacks[0]


def write(plan: Plan, out: pathlib.Path, shard_bytes: int = aside.SHARD_BYTES) -> None:
    """Writes the planned folder aside, verifies it and renames it.

    Verified: every file's size and header; every byte of the weights, read back from the disk (its
    cached pages dropped first, where the system lets us) against the CRC-32 of what was read from
    the source. Raises UserError, leaving nothing, when the folder is in use, the disk too small or
    full, the source cut short meanwhile, or the copy not what was read.
    """
    out = out.absolute()
    shards = aside.shard(plan.tensors, lambda t: t[1].nbytes, shard_bytes)
    names = {file: [name for name, _ in tensors] for file, tensors in shards.items()}
    files = plan.files | aside.index(names, total_size=plan.nbytes)
    needed = plan.nbytes + 200 * len(plan.tensors) + sum(map(len, files.values()))
    aside.check_room(out, needed)
    with (
        aside.aside(out, aside.new_token()) as folder,
        concurrent.futures.ThreadPoolExecutor(2) as background,
        _cancelled(background),
    ):
        checks = []
        for file, tensors in shards.items():
            layout = [(name, t.code, t.shape, t.nbytes) for name, t in tensors]
            head = safetensors.header(layout)
            crc = _copy(folder / file, head, [t for _, t in tensors], background)
            checks.append(background.submit(_check, folder / file, layout, crc))
        aside.write_files(folder, files)
        for check in checks:
            check.result()


@contextlib.contextmanager
def _cancelled(pool: concurrent.futures.Executor) -> Iterator[None]:
    """On failure nothing that is queued begins."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _copy(
    path: pathlib.Path,
    head: bytes,
    tensors: Sequence[Stored],
    background: concurrent.futures.Executor,
) -> int:
    """Writes a shard; returns the CRC-32 of all its bytes."""
    buffer = memoryview(bytearray(BUFFER))
    crc, dirty, flushes = zlib.crc32(head), 0, []
    with contextlib.ExitStack() as stack:
        sources = {p: stack.enter_context(p.open("rb", 0)) for p in {t.path for t in tensors}}
        to = stack.enter_context(path.open("wb", 0))
        to.write(head)
        for t in tensors:
            file = sources[t.path]
            file.seek(t.start)
            left = t.nbytes
            while left:
                part = buffer[: file.readinto(buffer[: min(left, BUFFER)])]
                if not part:
                    raise UserError(f"{t.path}: became shorter while it was read; start again")
                crc = zlib.crc32(part, crc)
                left -= len(part)
                dirty += len(part)
                while part:
                    part = part[to.write(part) :]
            if dirty >= FLUSH and all(flush.done() for flush in flushes):
                flushes, dirty = [background.submit(os.fdatasync, to.fileno())], 0
        for flush in flushes:
            flush.result()
        os.fsync(to.fileno())
    return crc


def _check(path: pathlib.Path, layout: Sequence[safetensors.Entry], crc: int) -> None:
    """Raises UserError unless the file holds the tensors of `layout` and has this CRC-32."""
    tensors, _ = safetensors.read_header(path)
    if [(t.name, t.code, t.shape, t.nbytes) for t in tensors.values()] != list(layout):
        raise UserError(f"{path.name}: read back from the disk, its header is not what was written")
    buffer, found = memoryview(bytearray(BUFFER)), 0
    with path.open("rb", 0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while size := file.readinto(buffer):
            found = zlib.crc32(buffer[:size], found)
    if found != crc:
        raise UserError(f"{path.name}: read back from the disk, it is not what was written")
