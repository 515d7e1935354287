"""One decoder for every family: parameters, partition specs, the forward pass with layer gates.

Axes: B batch, T time, S keys, D width, K key-value heads, G query heads a key-value head, H head
width, F mlp width, V vocabulary, L layers, E experts. Query head n is k * G + g.

Parameters are a nested dict; layers that are alike are stacked on axis 0 (all of them, but in a
model with experts whose first layers have none), so that removing layers is a slice and the compile
time does not grow with depth.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.models import recompute, rope
from e3jax.models.attention import make_attention
from e3jax.models.config import ModelConfig, Rope, Run
from e3jax.models.gate import apply_gate
from e3jax.models.head import Head, gathered, unembed
from e3jax.models.layer import layer
from e3jax.models.norm import norm
from e3jax.models.norm import rms_norm as rms_norm
from e3jax.models.params import Leaf, Params, param_table
from e3jax.models.params import count_params as count_params


@flax.struct.dataclass
class Batch:
    """Packed windows. All [B, T]: int32 but for the mask."""

    tokens: jax.Array
    positions: jax.Array  # within the document
    segments: jax.Array  # 0 = padding, 1.. = documents of the window
    targets: jax.Array  # the token at t + 1
    mask: jax.Array  # bool: the prediction made at t carries loss
    # How many documents a window has at most; None = not known. A constant of the program.
    documents: int | None = flax.struct.field(pytree_node=False, default=None)


def abstract_batch(rows: int, time: int) -> Batch:
    """ShapeDtypeStructs of a batch, with their sharding where a mesh is set."""
    place = mesh.sharding(("batch", None), (rows, time))
    ids = jax.ShapeDtypeStruct((rows, time), jnp.int32, sharding=place)
    mask = jax.ShapeDtypeStruct((rows, time), jnp.bool_, sharding=place)
    return Batch(ids, ids, ids, ids, mask)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def _map_table(fn: Callable[[Leaf], Any], cfg: ModelConfig) -> Params:
    return jax.tree.map(fn, param_table(cfg), is_leaf=_is_leaf)


def param_specs(cfg: ModelConfig) -> Params:
    """PartitionSpec of every parameter under the mesh that is set."""
    return _map_table(lambda leaf: mesh.spec(leaf.axes, leaf.shape), cfg)


def abstract_params(cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """ShapeDtypeStruct of every parameter, with its sharding where a mesh is set."""
    return _map_table(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, dtype, sharding=mesh.sharding(leaf.axes, leaf.shape)
        ),
        cfg,
    )


def replicated(cfg: ModelConfig, dtype: Any) -> list[str]:
    """A line for every size that an axis of the mesh should shard and does not divide.

    dtype: of the parameters, for the bytes that a device holds of them and would hold.
    """
    found: dict[tuple[str, int, str], dict[str, int]] = {}  # axis, its size, dimensions: leaves
    for path, leaf in jax.tree.leaves_with_path(param_table(cfg), is_leaf=_is_leaf):
        for why in mesh.undivided(leaf.axes, leaf.shape):
            place = mesh.sharding(leaf.axes, leaf.shape)
            assert place is not None  # a mesh is set
            held = math.prod(place.shard_shape(leaf.shape)) * jnp.dtype(dtype).itemsize
            found.setdefault(why, {})[path[-1].key] = held
    lines = []
    for (axis, count, sizes), held in found.items():
        gb = sum(held.values()) / 1e9
        lines.append(
            f"mesh.{axis}={count} does not divide {sizes}; replicated over it: {', '.join(held)} "
            f"({gb:.3g} GB a device instead of {gb / count:.3g})"
        )
    return lines


def init_params(key: jax.Array, cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters: normal matrices, unit norms, zero biases; never whole on one device."""
    leaves, tree = jax.tree.flatten(param_table(cfg), is_leaf=_is_leaf)

    def draw(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(leaves))
        arrays = []
        for leaf, k in zip(leaves, keys, strict=True):
            if leaf.init is None:
                x = jnp.ones(leaf.shape, dtype)
            else:
                x = (leaf.init * jax.random.normal(k, leaf.shape)).astype(dtype)
            arrays.append(x)
        return jax.tree.unflatten(tree, arrays)

    shardings = None
    if mesh.current() is not None:
        shardings = jax.tree.map(lambda a: a.sharding, abstract_params(cfg, dtype))
    return jax.jit(draw, out_shardings=shardings)(key)


def take_layers(params: Params, cfg: ModelConfig, keep: Sequence[int]) -> Params:
    """The model made of layers `keep`: the same parameters, the stacks sliced. cfg: of `params`."""
    taken = {name: w for name, w in params.items() if name not in cfg.stacks}
    for name, ids in cfg.stacks.items():
        if index := [ids.index(i) for i in keep if i in ids]:
            places = jnp.asarray(index, jnp.int32)
            taken[name] = jax.tree.map(lambda w: w[places], params[name])  # noqa: B023
    return taken


def weights_of(params: Params, run: Run, index: Any) -> Params:
    """Those of a layer of the run, out of its stack; index: its number, int or int32 scalar."""
    return jax.tree.map(lambda stack: stack[index - run.first + run.at], params[run.stack])


def first_stream(params: Params, tokens: jax.Array, cfg: ModelConfig, dtype: Any) -> jax.Array:
    """The residual stream before all layers, [B, T, D]: embeddings, scaled where the model does."""
    h = embed(params, tokens, dtype)
    return h if cfg.embed_scale == 1.0 else h * jnp.asarray(cfg.embed_scale, dtype)


def embed(params: Params, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Token embeddings [B, T, D]."""
    table, shape = params["embed"], (*tokens.shape, params["embed"].shape[1])
    if mesh.current() is None:
        return table[tokens].astype(dtype)
    # Each device looks its part of the width up for all rows of its replica, then they exchange
    # rows for width. Asked for the rows at once, XLA would replicate them over all replicas.
    here = mesh.spec(("replica_batch", None, "embed"), shape)
    all_rows = jax.sharding.reshard(tokens, mesh.spec(("replica_batch", None), tokens.shape))
    h = table.at[all_rows].get(out_sharding=here).astype(dtype)
    return mesh.rows_for_width(h)


def window_kinds(cfg: ModelConfig) -> tuple[tuple[int | None, ...], np.ndarray]:
    """The distinct sliding windows of the model, and which of them each layer uses, int32 [L]."""
    kinds = tuple(dict.fromkeys(cfg.windows))
    return kinds, np.array([kinds.index(window) for window in cfg.windows], np.int32)


def rope_kinds(cfg: ModelConfig) -> tuple[tuple[Rope | None, ...], np.ndarray | None]:
    """The distinct ropes of the model, and which of them each layer uses, int32 [L]; None where
    all use one."""
    kinds = tuple(dict.fromkeys(cfg.ropes or (cfg.rope,)))
    if len(kinds) == 1:
        return kinds, None
    return kinds, np.array([kinds.index(rope) for rope in cfg.ropes], np.int32)


def hidden(
    params: Params,
    batch: Batch,
    cfg: ModelConfig,
    *,
    dtype: Any,
    gates_bl: jax.Array | None = None,
    layer_ids: jax.Array | None = None,
    stream: jax.Array | None = None,
    remat: str = "layer",
    observe: Callable[..., Any] | None = None,
    beside: Any = None,
) -> Any:
    """Final hidden states [B, T, D] in `dtype`, after the last norm: what the head reads.

    gates_bl: float32 [B, L] of 0 and 1, a mask a row; a gate of 0 skips the layer exactly, and the
      gradient reaches every gate (see gate.py).
    layer_ids: int32 [K]: run only these layers, in this order, without copying their weights.
    stream: the residual stream to begin with, instead of the embeddings.
    remat: what backward recomputes, see recompute.py: "layer" each layer from its input, "none"
      nothing, "selective" and "elementwise" what is cheap for the memory it would take.
    observe: statistics of (residual stream into, out of) each layer; then the result is a pair
      (hidden states, statistics stacked on axis 0). Layer outputs are before the final norm.
    beside: arrays [layers run, …], of which a layer's are a third argument of `observe`.
    """
    assert layer_ids is None or gates_bl is None, "gates are of all layers"
    apply = applier(batch, cfg, dtype)

    def body(h: jax.Array, xs: tuple) -> tuple[jax.Array, Any]:
        w, index, gate_b, more = xs
        y = of_number(index, h) if w is None else apply(w, h, index)
        stats = None if observe is None else observe(h, y, *([] if more is None else [more]))
        return (y if gate_b is None else apply_gate(h, y, gate_b)), stats

    of_number = by_number(params, cfg, apply)
    scan = functools.partial(jax.lax.scan, recompute.checkpoint(body, remat))
    h = first_stream(params, batch.tokens, cfg, dtype) if stream is None else stream
    stats = []
    gates_lb = None if gates_bl is None else gates_bl.T
    if layer_ids is not None:
        h, found = scan(h, (None, jnp.asarray(layer_ids, jnp.int32), None, beside))
        stats.append(found)
    for run in cfg.runs if layer_ids is None else ():
        # Not numpy's: of a constant to scan over, jax 0.10 for CPUs can make no program.
        xs = params, jnp.arange(cfg.num_layers), gates_lb, beside
        h, found = scan(h, of_run(xs, run))
        stats.append(found)
    h = last_norm(params, h, cfg)
    if observe is None:
        return h
    return h, jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats)


def stream_after(
    params: Params, batch: Batch, cfg: ModelConfig, count: int, dtype: Any
) -> jax.Array:
    """The residual stream [B, T, D] after the first `count` layers."""
    of_number = by_number(params, cfg, applier(batch, cfg, dtype))
    return jax.lax.fori_loop(0, count, of_number, first_stream(params, batch.tokens, cfg, dtype))


def of_run(arrays: tuple, run: Run) -> tuple:
    """(parameters, arrays [L, ...] …) -> (a run's stack of weights, its part of the others …)."""

    def part(x: Any, begin: int) -> jax.Array:
        return jnp.asarray(x if run.count == len(x) else x[begin : begin + run.count])

    params, *others = arrays
    return (
        jax.tree.map(lambda w: part(w, run.at), params[run.stack]),
        *jax.tree.map(lambda x: part(x, run.first), others),
    )


def by_number(
    params: Params, cfg: ModelConfig, apply: Callable[[Params, jax.Array, Any], jax.Array]
) -> Callable[[Any, jax.Array], jax.Array]:
    """A (number of a layer, residual stream) -> residual stream after it; the number may be traced.
    No layer's weights are copied out of their stack. apply: from `applier`."""

    def of_stack(name: str, place: jax.Array, index: jax.Array, h: jax.Array) -> jax.Array:
        return apply(jax.tree.map(lambda stack: stack[place], params[name]), h, index)

    places, which = np.zeros((2, cfg.num_layers), np.int32)
    for number, ids in enumerate(cfg.stacks.values()):
        places[list(ids)], which[list(ids)] = range(len(ids)), number
    branches = [functools.partial(of_stack, name) for name in cfg.stacks]

    def run(index: Any, h: jax.Array) -> jax.Array:
        if len(branches) == 1:
            return branches[0](index, index, h)
        place = jnp.asarray(places)[index]
        return jax.lax.switch(jnp.asarray(which)[index], branches, place, index, h)

    return run


def last_norm(params: Params, h_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The residual stream after all layers -> what the head reads."""
    return norm(params, "final_norm", h_btd, cfg)


def applier(
    batch: Batch, cfg: ModelConfig, dtype: Any, of: Callable[..., Any] = layer
) -> Callable[..., Any]:
    """A (weights, residual stream, index of the layer, options) -> residual stream after it, for a
    batch. of: what is computed of a layer, with `layer`'s arguments."""
    ropes, rope_of = rope_kinds(cfg)
    angles = rope.make_angles(batch.positions, ropes, cfg.rope_dim)
    kinds, kind_of = window_kinds(cfg)
    kind_l = jnp.asarray(kind_of, jnp.int32)
    attend = make_attention(
        batch.segments, kinds, cfg.head_dim, dtype, batch.documents, cfg.attention_cap, cfg.sinks
    )

    def apply(w: Params, h: jax.Array, index: Any, **options: Any) -> Any:
        cos_sin = angles(None if rope_of is None else jnp.asarray(rope_of)[index])
        see = functools.partial(attend, kind_l[index])
        return of(w, h, cos_sin, see, cfg, **options)

    return apply


def head(params: Params, cfg: ModelConfig) -> Head:
    """Output head, its matrix as stored."""
    return Head(params["embed" if cfg.tied else "head"], cfg.logits_scale, cfg.logits_cap)


def logits(params: Params, h_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """float32 [B, T, V]; for short sequences (decoding, tests): losses never form it whole."""
    return unembed(h_btd, gathered(head(params, cfg), h_btd.dtype))
