"""A Hugging Face checkpoint -> sharded parameters. Strict, and each process reads only its part.

Tensors are read in the order they lie on the disk, in pieces that are checked while they are in the
cache. Where the devices' memory is the host's (CPU), it is read into directly; elsewhere a leaf
grows on the devices, one layer's tensor after the other, through host memory that is used again:
the first touch of fresh pages takes longer than the reading. The programs that grow it are compiled
while the first tensors are read.
"""

import collections
import concurrent.futures
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from e3jax import mesh, processes
from e3jax.hf import reading
from e3jax.hf.families import read_config
from e3jax.hf.folders import in_pieces, match, raise_problems, source_dtype
from e3jax.hf.reading import Box
from e3jax.hf.tensors import Piece
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.progress import over

THREADS = min(8, 2 * (os.cpu_count() or 1))  # one waits for the disk while another checks
AHEAD = 2**28  # bytes of tensors being read behind the one that is put in its place
ALIGNMENT = 4096  # bytes; from 64 on a CPU device takes host memory as it is


def load_params(
    folder: str | pathlib.Path, cfg: ModelConfig | None = None, dtype: Any = None
) -> decoder.Params:
    """Parameters of a checkpoint, sharded as `decoder.abstract_params` says under the mesh set.

    dtype None = `source_dtype`. Beyond the arrays, the host needs memory for THREADS pieces of a
    few MB, and with accelerators for a layer, AHEAD bytes and two tensors. Raises UserError on
    anything that is not exactly the model of config.json, and on NaN or infinite weights, naming
    the tensors.
    """
    folder = pathlib.Path(folder)
    cfg = read_config(folder) if cfg is None else cfg
    both = match(folder, cfg)
    abstract = decoder.abstract_params(cfg, jnp.dtype(dtype or source_dtype(folder)))
    paths = jax.tree_util.tree_leaves_with_path(abstract)
    leaves = {tuple(key.key for key in path): leaf for path, leaf in paths}
    on_host = {leaf: _empty(x) for leaf, x in leaves.items()} if _fills_host_memory() else {}
    arrays: dict[tuple[str, ...], jax.Array] = {}
    finite = np.ones(len(both), bool)
    waiting: collections.deque = collections.deque()
    free = collections.defaultdict(list)  # host memory of rows that are on the devices, by shape
    pieces = [
        (n, piece, stored) for n, tensor in enumerate(both) for piece, stored in in_pieces(*tensor)
    ]
    # A row is what is put on the devices at once: a leaf, or its part of one layer.
    rows = collections.Counter(_row(piece) for _, piece, _ in pieces)
    memory: dict[Any, dict[Box, np.ndarray]] = {}
    stacks = {leaves[piece.leaf] for _, piece, _ in pieces if piece.index and not on_host}

    def memory_of(piece: Piece) -> dict[Box, np.ndarray]:
        leaf, row = leaves[piece.leaf], _row(piece)
        if on_host:
            return at(on_host[piece.leaf], piece.index)
        if row not in memory and free[leaf]:
            memory[row] = free[leaf].pop()
        elif row not in memory:
            memory[row] = _empty(mesh.part_of_stack(leaf) if piece.index else leaf)
        return at(memory[row], piece.index[1:])

    def finish() -> None:
        number, piece, _, reads = waiting.popleft()
        finite[number] &= all([read.result() for read in reads])
        leaf, row = leaves[piece.leaf], _row(piece)
        rows[row] -= 1
        if on_host or rows[row]:
            return
        parts = memory.pop(row)
        if not piece.index:
            arrays[piece.leaf] = _array(leaf, parts)
            return
        zeros, put = programs[leaf].result()
        if piece.leaf not in arrays:
            arrays[piece.leaf] = zeros()
        one = _array(mesh.part_of_stack(leaf), parts)
        arrays[piece.leaf] = put(arrays[piece.leaf], one, piece.index[0]).block_until_ready()
        free[leaf].append(parts)

    pieces.sort(key=lambda item: (item[2].path, item[2].start))
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        concurrent.futures.ThreadPoolExecutor(THREADS) as compiling,
    ):
        programs = {leaf: compiling.submit(_compile, *_lower(leaf)) for leaf in stacks}
        try:
            for number, piece, stored in over("tensors read", pieces, len(pieces)):
                reads = reading.submit(pool, piece, stored, memory_of(piece))
                waiting.append((number, piece, stored, reads))
                while sum(stored.nbytes for _, _, stored, _ in list(waiting)[1:]) > AHEAD:
                    finish()
            while waiting:
                finish()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if jax.process_count() > 1:  # each has seen its part alone
        finite = np.all(processes.gather(finite.tolist()), axis=0)
    wrong = [tensor.name for (tensor, _), ok in zip(both, finite, strict=True) if not ok]
    raise_problems(folder, {"NaN or infinite weights": wrong})
    arrays |= {leaf: _array(leaves[leaf], parts) for leaf, parts in on_host.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[tuple(key.key for key in path)], abstract
    )


def _row(piece: Piece) -> tuple:
    return piece.leaf, piece.index[:1]


def at(parts: Mapping[Box, np.ndarray], index: tuple[int, ...]) -> dict[Box, np.ndarray]:
    """Of parts of an array those at `index` of its first axes, each by its box on the others."""
    count = len(index)
    inside = {
        box: tuple(i - begin for i, (begin, _) in zip(index, box))
        for box in parts
        if all(begin <= i < end for i, (begin, end) in zip(index, box))
    }
    return {box[count:]: parts[box][place] for box, place in inside.items()}


def _fills_host_memory() -> bool:
    """Whether the arrays' memory is the host's, so that it need not be written twice."""
    found = jax.sharding.get_mesh()
    devices = [jax.devices()[0]] if found.empty else found.devices.flat
    return all(device.platform == "cpu" for device in devices)


def _sharding(leaf: jax.ShapeDtypeStruct) -> Sharding:
    return leaf.sharding or SingleDeviceSharding(jax.devices()[0])


def _boxes(leaf: jax.ShapeDtypeStruct) -> dict[Any, Box]:
    """The part of a leaf that each device of this process holds."""
    found = _sharding(leaf).addressable_devices_indices_map(leaf.shape)
    return {
        device: tuple(cut.indices(size)[:2] for cut, size in zip(index, leaf.shape, strict=True))
        for device, index in found.items()
        if index is not None
    }


def _empty(leaf: jax.ShapeDtypeStruct) -> dict[Box, np.ndarray]:
    """Host memory for each part of a leaf that this process holds, aligned for the devices."""
    parts = {}
    for box in set(_boxes(leaf).values()):
        shape = [end - begin for begin, end in box]
        nbytes = int(np.prod(shape)) * leaf.dtype.itemsize
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        parts[box] = memory[start : start + nbytes].view(leaf.dtype).reshape(shape)
    return parts


def _array(leaf: jax.ShapeDtypeStruct, parts: Mapping[Box, np.ndarray]) -> jax.Array:
    """The array whose parts these are; a CPU device takes the memory of a part as it is."""
    taken: set[Box] = set()
    shards = []
    for device, box in _boxes(leaf).items():
        part = parts[box].copy() if box in taken else parts[box]  # two devices never share it
        taken.add(box)
        shards.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(leaf.shape, _sharding(leaf), shards)


def _lower(leaf: jax.ShapeDtypeStruct) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """What makes a stack of zeros, and what sets one layer of it in its own memory."""
    place, part = _sharding(leaf), mesh.part_of_stack(leaf)
    zeros = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=place)
    put = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnames="axis", donate_argnums=0)
    return zeros.lower(), put.lower(leaf, part, 0, axis=0)


def _compile(*programs: jax.stages.Lowered) -> list[jax.stages.Compiled]:
    return [program.compile() for program in programs]
