"""Some layers of a checkpoint as a checkpoint of its own, by copying byte ranges.

No model in memory, any dtype, any family, and no jax. The kernel copies: reading and writing here
took 1.6 times as long as cp, and with a CRC of all that is read back 4 times.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import pathlib
import re
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
from e3jax.progress import over

RANGE = 64 * 2**20  # bytes a call to the kernel; a signal is heeded between two
SAMPLE = 64 * 2**10  # bytes compared at both ends of every tensor, and once every RANGE between
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
    if is_known(config) and not quantized and with_drafts(config, keep) == list(keep):
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

    Verified, read back from the disk (cached pages dropped first, where the system lets us): every
    file's size and header, and of every tensor both ends and a sample each RANGE, compared with the
    source; what lies between is the kernel's word. Raises UserError, leaving nothing, when the
    folder is in use, the disk too small or full, the source cut short meanwhile, or a copy differs.
    """
    out = out.absolute()
    shards = aside.shard(plan.tensors, lambda t: t[1].nbytes, shard_bytes)
    names = {file: [name for name, _ in tensors] for file, tensors in shards.items()}
    files = dict(plan.files) | aside.index(names, total_size=plan.nbytes)
    needed = plan.nbytes + 200 * len(plan.tensors) + sum(map(len, files.values()))
    aside.check_room(out, needed)
    with (
        aside.aside(out, aside.new_token()) as folder,
        concurrent.futures.ThreadPoolExecutor(1) as behind,
        _cancelled(behind),
    ):
        done = []  # a shard goes to the disk and is checked while the next is copied
        for file, tensors in over("shards copied", shards.items(), len(shards)):
            _copy(folder / file, tensors)
            done.append(behind.submit(_check, folder / file, tensors))
        for check in done:
            check.result()
        aside.write_files(folder, files)


@contextlib.contextmanager
def _cancelled(pool: concurrent.futures.Executor) -> Iterator[None]:
    """On failure nothing that is queued begins."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _layout(tensors: Sequence[tuple[str, Stored]]) -> list[safetensors.Entry]:
    return [(name, t.code, t.shape, t.nbytes) for name, t in tensors]


def _copy(path: pathlib.Path, tensors: Sequence[tuple[str, Stored]]) -> None:
    """Writes a shard; it is not on the disk yet."""
    with contextlib.ExitStack() as stack:
        paths = {t.path for _, t in tensors}
        sources = {p: stack.enter_context(p.open("rb", 0)).fileno() for p in paths}
        file = stack.enter_context(path.open("wb", 0))
        file.write(safetensors.header(_layout(tensors)))
        end = file.tell()
        for _, t in tensors:
            for start in range(0, t.nbytes, RANGE):
                size = min(RANGE, t.nbytes - start)
                if _copy_range(sources[t.path], file.fileno(), t.start + start, end, size) < size:
                    raise UserError(f"{t.path}: became shorter while it was read; start again")
                end += size


def _copy_range(source: int, to: int, offset: int, at: int, size: int) -> int:
    """Copies bytes between files; returns how many there were."""
    done = 0
    while done < size:
        try:
            step = os.copy_file_range(source, to, size - done, offset + done, at + done)
        except (AttributeError, OSError) as error:  # not on this system, or these file systems
            unable = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
            if isinstance(error, OSError) and error.errno not in unable:
                raise
            part = os.pread(source, min(size - done, 2**20), offset + done)
            step = os.pwrite(to, part, at + done) if part else 0
        if not step:
            break
        done += step
    return done


def _check(path: pathlib.Path, tensors: Sequence[tuple[str, Stored]]) -> None:
    """Syncs a shard, and raises UserError unless what the disk returns is the source's."""
    with path.open("rb+", 0) as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found, _ = safetensors.read_header(path)
    if [(t.name, t.code, t.shape, t.nbytes) for t in found.values()] != _layout(tensors):
        raise UserError(f"{path.name}: read back from the disk, its header is not what was written")
    for name, t in tensors:
        for start in {*range(0, t.nbytes, RANGE), max(0, t.nbytes - SAMPLE)}:
            if found[name].read(start, SAMPLE) != t.read(start, SAMPLE):
                raise UserError(f"{path.name}: {name} read back is not the source's")
