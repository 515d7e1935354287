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
from e3jax.hf.folders import match, raise_problems, source_dtype
from e3jax.hf.reading import Box
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
    free = collections.defaultdict(list)  # host memory of layers that are on the devices, by shape
    stacks = {leaves[t.leaf] for t, _ in both if t.layer is not None and not on_host}

    def finish() -> None:
        number, (tensor, _), parts, reads = waiting.popleft()
        finite[number] = all([read.result() for read in reads])
        leaf = leaves[tensor.leaf]
        if on_host:
            return
        if tensor.layer is None:
            arrays[tensor.leaf] = _array(leaf, parts)
            return
        zeros, put = programs[leaf].result()
        if tensor.leaf not in arrays:
            arrays[tensor.leaf] = zeros()
        row = _array(mesh.part_of_stack(leaf), parts)
        arrays[tensor.leaf] = put(arrays[tensor.leaf], row, tensor.layer).block_until_ready()
        free[leaf].append(parts)

    by_place = sorted(enumerate(both), key=lambda item: (item[1][1].path, item[1][1].start))
    with (
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        concurrent.futures.ThreadPoolExecutor(THREADS) as compiling,
    ):
        programs = {leaf: compiling.submit(_compile, *_lower(leaf)) for leaf in stacks}
        try:
            for number, (tensor, stored) in over("tensors read", by_place, len(by_place)):
                leaf, parts = leaves[tensor.leaf], on_host.get(tensor.leaf)
                if parts is not None and tensor.layer is not None:
                    parts = {box[1:]: part[tensor.layer] for box, part in parts.items()}
                elif parts is None and tensor.layer is not None and free[leaf]:
                    parts = free[leaf].pop()
                elif parts is None:
                    parts = _empty(leaf if tensor.layer is None else mesh.part_of_stack(leaf))
                reads = reading.submit(pool, tensor, stored, parts)
                waiting.append((number, (tensor, stored), parts, reads))
                while sum(stored.nbytes for _, (_, stored), *_ in list(waiting)[1:]) > AHEAD:
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
