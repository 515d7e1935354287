"""The device mesh, and the only place that knows the names of its axes.

Every axis is explicit (`AxisType.Explicit`): shardings are part of array types, so a mistake is an
error while tracing, on any machine, not a silent gather on a pod.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from e3jax.errors import UserError

AXES = ("replica", "data", "model")
BATCH = ("replica", "data")

# Logical axis -> mesh axes. FSDP shards the width of every weight over `data`; tensor parallelism
# shards heads, mlp, experts and vocabulary over `model`; rows of a batch are spread over both data
# axes. Of key-value heads and the query heads of each (groups), the first that `model` divides
# takes it: with few key-value heads, queries and outputs are sharded, keys and values replicated.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH,
    "replica_batch": "replica",
    "device": AXES,
    "embed": "data",
    "rank": "data",
    "heads": "model",
    "groups": "model",
    "mlp": "model",
    "experts": "model",
    "vocab": "model",
}


def make_mesh(
    replica: int = 1, data: int = -1, model: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A (replica, data, model) mesh of explicit axes; `data=-1` takes all remaining devices.

    Where the devices are of several slices (TPU pods joined by the data-centre network, GPU hosts
    each with its own NVLink), `replica` is spread over the slices first, then `data`, never
    `model`: what crosses the slow network is as little as the sizes allow.
    Raises UserError when the sizes do not multiply to the number of devices, or not over slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1:
        data = len(devices) // (replica * model)
    if replica * data * model != len(devices):
        raise UserError(
            f"mesh: replica={replica} x data={data} x model={model} needs "
            f"{replica * data * model} devices and there are {len(devices)}; change the mesh sizes"
        )
    shape, types = (replica, data, model), (AxisType.Explicit,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:  # an axis may be a part of one of the torus's: 2 x 8 x 2 of 4x4x2
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(grid, AXES, axis_types=types)
    outer = math.gcd(replica, slices)
    across = (outer, slices // outer, 1)
    if data % across[1]:
        raise UserError(
            f"mesh: replica={replica} x data={data} cannot be spread over {slices} slices of "
            f"devices; make mesh.replica a multiple of {slices}"
        )
    within = [size // n for size, n in zip(shape, across, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(grid, AXES, axis_types=types)


def abstract_mesh(replica: int, data: int, model: int) -> jax.sharding.AbstractMesh:
    """A mesh of types alone, for `jax.sharding.use_abstract_mesh`: shapes a device, no devices."""
    sizes = (replica, data, model)
    return jax.sharding.AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)


def current() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axis_size(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along a spec entry."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[n] for n in names], dtype=int))


def spec(axes: Sequence[str | None], shape: Sequence[int] | None = None) -> P:
    """Logical axes -> PartitionSpec by RULES; an axis of the mesh goes to the first that names it.

    With `shape` and a mesh set, it goes to the first whose size it divides, and to none where there
    is none: the array is then replicated over it.
    """
    mesh = current() if shape is not None else None
    sizes = [None] * len(axes) if shape is None else shape
    entries, free = [], set(AXES)
    for name, size in zip(axes, sizes, strict=True):
        entry = None if name is None else RULES[name]
        wanted = {entry} if isinstance(entry, str) else set(entry or ())
        fits = mesh is None or size is None or size % axis_size(mesh, entry) == 0
        entries.append(entry if wanted and wanted <= free and fits else None)
        if entries[-1] is not None:
            free -= wanted
    return P(*entries)


def undivided(axes: Sequence[str | None], shape: Sequence[int]) -> list[tuple[str, int, str]]:
    """The mesh axes that RULES name for an array and that it is replicated over for its sizes.

    Each with its size and what it does not divide: ("model", 4, "heads=2, groups=3").
    """
    mesh, taken, found = current(), spec(axes, shape), {}
    for name, size in zip(axes, shape, strict=True):
        axis = None if name is None else RULES[name]
        if mesh is not None and isinstance(axis, str) and axis_size(mesh, axis) > 1:
            found.setdefault(axis, []).append(f"{name}={size}")
    return [
        (axis, mesh.shape[axis], ", ".join(sizes))
        for axis, sizes in found.items()
        if mesh is not None and axis not in taken
    ]


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


def rows_for_width(x_btd: jax.Array) -> jax.Array:
    """[B, T, D] of a replica's rows and a device's part of the width, or the whole of it -> of the
    device's own rows, whole; inside jit. XLA would make all of it whole on every device first."""
    here, there = jax.typeof(x_btd).sharding.spec, spec(("batch", None, None))
    if here[2] is None:
        return jax.sharding.reshard(x_btd, there)
    return jax.shard_map(
        lambda x: jax.lax.all_to_all(x, here[2], split_axis=0, concat_axis=2, tiled=True),
        in_specs=here,
        out_specs=there,
    )(x_btd)


def on_own_tokens(
    fn: Callable[..., Any], *arrays: jax.Array, whole: Sequence[jax.Array] = ()
) -> Any:
    """`fn`, a kernel, by each device on the tokens of its rows, inside jit. Arrays [B, T, ...] are
    [B T, ...] to it, and so is what it gives, one array or several; others it has whole."""

    def on_tokens(*own: jax.Array) -> Any:
        b, t = own[0].shape[:2]
        tokens = (x.reshape(b * t, *x.shape[2:]) for x in own[: len(arrays)])
        found = fn(*tokens, *own[len(arrays) :])
        return jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]), found)

    given = (*arrays, *whole)
    if current() is None:
        return on_tokens(*given)
    specs = (P(BATCH),) * len(arrays) + (P(),) * len(whole)
    # An axis of one device has a name too.
    placed = map(jax.sharding.reshard, given, specs)
    return jax.shard_map(on_tokens, in_specs=specs, out_specs=P(BATCH), check_vma=False)(*placed)


def on_own_heads(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments_bt: jax.Array,
    sinks_kg: jax.Array | None = None,
) -> jax.Array:
    """`attend(q, k, v, segments)`, a kernel, by each device on its own rows and heads.

    q [B, T, K, G, H], k and v [B, T, K, H] -> like q. sinks: a last argument, where there are any.
    """
    more = () if sinks_kg is None else (sinks_kg,)
    if current() is None:
        return attend(q, k, v, segments_bt, *more)
    place = spec(("batch", None, "heads", "groups", None), q.shape)
    keys, of_heads = spec(("batch", None, "heads", None), k.shape), P(*place[2:4])
    return jax.shard_map(
        attend,
        in_specs=(place, keys, keys, spec(("batch", None)), *(of_heads for _ in more)),
        out_specs=place,
        check_vma=False,  # a kernel's outputs do not say over which axes they vary
    )(q, k, v, segments_bt, *more)


def row_shards() -> int:
    """The devices that share the rows of a batch."""
    set_mesh = current()
    return 1 if set_mesh is None else axis_size(set_mesh, BATCH)


def shards_rows() -> bool:
    """Whether the rows of a batch are on several devices."""
    return row_shards() > 1


def is_sharded(x: jax.Array, axis: int) -> bool:
    """Whether devices have parts of this axis of an array, inside jit."""
    set_mesh = current()
    if set_mesh is None:
        return False
    return axis_size(set_mesh, jax.typeof(x).sharding.spec[axis]) > 1


def entry(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], inside jit. Of an axis that devices have parts of, the one that has the entry tells
    the others."""
    if not is_sharded(x, 0):
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    place = P(None, *jax.typeof(x).sharding.spec[1:])
    return x.at[jnp.array([index])].get(out_sharding=place)[0]


def place(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """An array laid out by these logical axes, inside jit; itself where no mesh is set."""
    return x if current() is None else jax.sharding.reshard(x, spec(axes, x.shape))


def take_rows(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """The rows `index` of an axis that the batch axes share, int32 [B], shared as they are; inside
    jit. The rows of `x` travel, so they should be few."""
    at = (*(slice(None) for _ in range(axis)), index)
    if current() is None:
        return x[at]
    at = (*at[:-1], jax.sharding.reshard(index, spec((None,))))
    return x.at[at].get(out_sharding=jax.typeof(x).sharding.spec)


def repeat_rows(x: jax.Array, count: int) -> jax.Array:
    """[W, ...] -> [W * count, ...], each row `count` times in a row, where it is; inside jit."""
    if count == 1:
        return x
    shape = (x.shape[0] * count, *x.shape[1:])
    each = jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))
    place = None if current() is None else jax.typeof(x).sharding.spec
    return each.reshape(shape, out_sharding=place)


def gather(weight: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """A weight whole over the batch axes, inside jit; other axes as the rules place them. For one
    that many operations use: it is gathered once."""
    if current() is None:
        return weight
    return jax.sharding.reshard(weight, _whole(axes, weight.shape))


def unreduced(axes: Sequence[str | None], shape: Sequence[int]) -> P | None:
    """`out_sharding` of the gradient of a weight that `gather` gave: each device has that of its
    own rows. So parts of it add up on each device, and are reduced once, by `scatter`."""
    if current() is None:
        return None
    return _whole(axes, shape).update(unreduced=frozenset(BATCH))


def scatter(gradient: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """An `unreduced` gradient reduced, and sharded as its weight is."""
    if current() is None:
        return gradient
    return jax.sharding.reshard(gradient, spec(axes, gradient.shape))


def _whole(axes: Sequence[str | None], shape: Sequence[int]) -> P:
    return spec([None if a in ("embed", "rank") else a for a in axes], shape)


def part_of_stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What one entry of axis 0, the layers, is of a stacked leaf; that axis is never sharded."""
    place = leaf.sharding
    if place is not None:
        place = NamedSharding(place.mesh, P(*place.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)


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


def check_shared(what: str, rows: int) -> None:
    """Raises UserError, naming `what`, unless the batch axes of the mesh can share rows evenly."""
    if (set_mesh := current()) is None:
        return
    shards = axis_size(set_mesh, BATCH)
    if rows % shards:
        model = set_mesh.shape["model"] * shards // math.gcd(rows, shards)
        raise UserError(
            f"{what}={rows}: cannot be shared evenly by mesh.replica x mesh.data = {shards}; take "
            f"a multiple of {shards}, or mesh.model={model}"
        )


def rows_here(batch: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold: int64, ascending.

    All of them where the batch axes lie within a process. Raises UserError when the devices cannot
    share the rows evenly.
    """
    check_shared("batch", batch)
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


def share_batch(tree: Any) -> Any:
    """The same of arrays [B, ...] that every process has whole."""
    return shard_batch(jax.tree.map(lambda x: x[rows_here(len(x))], tree))


def row_owners(batch: int) -> np.ndarray:
    """The process that has each row of a global batch, the lowest where several do: int64 [B]."""
    place = sharding(("batch",))
    if place is None:
        return np.zeros(batch, np.int64)
    owners = np.full(batch, jax.process_count(), np.int64)
    for device, (part,) in place.devices_indices_map((batch,)).items():
        owners[part] = np.minimum(owners[part], device.process_index)
    return owners


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows (those of `rows_here`) of an array that only its axis 0 is split of."""
    if x.is_fully_addressable:
        return np.asarray(x)
    parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
    return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])
