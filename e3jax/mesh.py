"""The device mesh, and the only place that knows the names of its axes.

Every axis is explicit (`AxisType.Explicit`): shardings are part of array types, so a mistake is an
error while tracing, on any machine, not a silent gather on a pod.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from e3jax.errors import UserError

AXES = ("replica", "data", "model")
BATCH = ("replica", "data")

# Logical axis -> mesh axes. FSDP shards the width of every weight over `data`; tensor parallelism
# shards heads, mlp and vocabulary over `model`; rows of a batch are spread over both data axes.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "device": AXES,
    "embed": "data",
    "heads": "model",
    "mlp": "model",
    "vocab": "model",
}


def make_mesh(
    replica: int = 1, data: int = -1, model: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A (replica, data, model) mesh of explicit axes; `data=-1` takes all remaining devices.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = len(devices) // (replica * model)
    if replica * data * model != len(devices):
        raise UserError(
            f"mesh: replica={replica} x data={data} x model={model} needs "
            f"{replica * data * model} devices and there are {len(devices)}; change the mesh sizes"
        )
    shape = (replica, data, model)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def current() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def platform() -> str | None:
    """What the mesh that is set is made of, such as "tpu"; None where no mesh or device says it.

    Compiled ahead of time for a TPU this is "tpu", while jax.default_backend() is the host's own.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def axis_size(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along a spec entry."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[n] for n in names], dtype=int))


def spec(axes: Sequence[str | None], shape: Sequence[int] | None = None) -> P:
    """Logical axes -> PartitionSpec by RULES.

    With `shape` and a mesh set, a dimension that the mesh axis does not divide is replicated.
    """
    entries = [None if a is None else RULES.get(a) for a in axes]
    mesh = current()
    if shape is not None and mesh is not None:
        entries = [
            e if size % axis_size(mesh, e) == 0 else None
            for e, size in zip(entries, shape, strict=True)
        ]
    return P(*entries)


def sharding(
    axes: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding | None:
    """The sharding of an array with these logical axes under the mesh that is set, or None.

    Under an abstract mesh (no devices, only types) it is good for jax.eval_shape alone.
    """
    if (abstract := current()) is None:
        return None
    mesh = jax.sharding.get_mesh()
    return NamedSharding(abstract if mesh.empty else mesh, spec(axes, shape))


def out(axes: Sequence[str | None], shape: Sequence[int] | None = None) -> P | None:
    """`out_sharding` of an operation inside jit: the spec, or None where no mesh is set."""
    return None if current() is None else spec(axes, shape)


def abstract(tree: Any) -> Any:
    """ShapeDtypeStructs, such as jax.eval_shape gives, on the mesh that is set.

    Those know their spec at most; one that has none is whole on every device.
    """

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = sharding((None,) * len(x.shape))
        if place is not None and x.sharding is not None:
            place = NamedSharding(place.mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, tree)


def replicate(tree: Any) -> Any:
    """Every leaf whole on every device of the mesh that is set (host arrays or device arrays).

    The spec has an entry for each axis, as jit's outputs do: a plain P() would be another type, and
    a step given its own output would compile again.
    """
    return jax.tree.map(lambda x: jax.device_put(x, sharding((None,) * np.ndim(x))), tree)


def rows_here(batch: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold: int64, ascending.

    All of them where the batch axes lie within a process. Raises UserError when the devices cannot
    share the rows evenly.
    """
    set_mesh = current()
    shards = 1 if set_mesh is None else axis_size(set_mesh, BATCH)
    if batch % shards:
        raise UserError(f"a batch of {batch} rows cannot be shared evenly by {shards} devices")
    place = sharding(("batch",))
    if place is None:
        return np.arange(batch)
    parts = place.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[part] for part in parts]))


def shard_batch(tree: Any) -> Any:
    """This process's rows (those of `rows_here`) -> global arrays, axis 0 over the batch axes."""

    def one(x: np.ndarray) -> jax.Array:
        place = sharding(("batch",) + (None,) * (np.ndim(x) - 1))
        if place is None:
            return jax.device_put(x)
        x = np.asarray(x)
        if jax.process_count() == 1:
            return jax.device_put(x, place)
        shards = axis_size(place.mesh.abstract_mesh, BATCH)
        each = len(x) // len(rows_here(shards))  # rows of a shard
        rows = rows_here(shards * each)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first = int(np.searchsorted(rows, index[0].start or 0))
            return x[first : first + each]

        return jax.make_array_from_callback((shards * each, *x.shape[1:]), place, part)

    return jax.tree.map(one, tree)
