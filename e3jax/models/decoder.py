"""One decoder for every family: parameters, partition specs, the forward pass with layer gates.

Axes: B batch, T time, S keys, D width, K key-value heads, G query heads a key-value head, H head
width, F mlp width, V vocabulary, L layers. Query head n is k * G + g.

Parameters are a nested dict; the layers are stacked on axis 0, so that removing layers is a slice
and the compile time does not grow with depth.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models import recompute, rope
from e3jax.models.attention import Attend, make_attention, precision
from e3jax.models.config import ModelConfig
from e3jax.models.gate import apply_gate
from e3jax.models.norm import norm_rotate, rms_norm
from e3jax.models.params import Leaf, Params, param_table
from e3jax.models.params import count_params as count_params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


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


def take_layers(params: Params, keep: Sequence[int]) -> Params:
    """The model made of layers `keep`: the same parameters, the stack sliced."""
    index = jnp.asarray(keep, jnp.int32)
    return {**params, "layers": jax.tree.map(lambda w: w[index], params["layers"])}


def weights_of(params: Params, index: Any) -> Params:
    """One layer's, out of the stacks; index: int or int32 scalar."""
    return jax.tree.map(lambda stack: stack[index], params["layers"])


def _project(expr: str, x: jax.Array, w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """einsum of activations and a weight, in the activations' dtype, with the result's sharding.

    Letters that are summed over must be in the order of their axes by the alphabet, in which einsum
    sums: else XLA transposes both operands.
    """
    shape = jax.eval_shape(lambda a, b: jnp.einsum(expr, a, b), *map(_untyped, (x, w))).shape
    return jnp.einsum(
        expr,
        x,
        w.astype(x.dtype),
        precision=precision(x.dtype),
        out_sharding=mesh.out(axes, shape),
    )


def _untyped(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def attention(
    w: Params,
    x_btd: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cfg: ModelConfig,
) -> jax.Array:
    """Self-attention; `attend` knows who sees whom, and in decoding the keys that came before."""
    q = _project("btd,kghd->btkgh", x_btd, w["q"], ("batch", None, "heads", "groups", None))
    k = _project("btd,khd->btkh", x_btd, w["k"], ("batch", None, "heads", None))
    v = _project("btd,khd->btkh", x_btd, w["v"], ("batch", None, "heads", None))
    if cfg.qkv_bias:
        q, k, v = (
            y + w[f"{n}_bias"].astype(y.dtype) for n, y in zip("qkv", (q, k, v), strict=True)
        )
    q, k, v = map(recompute.keep, (q, k, v))  # before the norm, whose backward asks for its input
    if cfg.qk_norm:
        q = norm_rotate(q, w["q_norm"], cos_sin, cfg.norm_eps)
        k = norm_rotate(k, w["k_norm"], cos_sin, cfg.norm_eps)
    else:
        q, k = rope.rotate(q, cos_sin), rope.rotate(k, cos_sin)
    y = attend(q, k, v)
    y = _project("btnxy,dnxy->btd", y, w["o"], ("batch", None, None))
    return y + w["o_bias"].astype(y.dtype) if cfg.out_bias else y


def mlp(w: Params, x_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Gated feed-forward network."""
    gate = _project("btd,fd->btf", x_btd, w["gate"], ("batch", None, "mlp"))
    up = _project("btd,fd->btf", x_btd, w["up"], ("batch", None, "mlp"))
    if cfg.mlp_bias:
        gate, up = gate + w["gate_bias"].astype(gate.dtype), up + w["up_bias"].astype(up.dtype)
    gate, up = map(recompute.keep_large, (gate, up))
    y = ACTIVATIONS[cfg.activation](gate) * up
    y = _project("btf,df->btd", y, w["down"], ("batch", None, None))
    return y + w["down_bias"].astype(y.dtype) if cfg.mlp_bias else y


def layer(
    w: Params,
    h_btd: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cfg: ModelConfig,
) -> jax.Array:
    """One decoder layer, residual stream in and out; `w` has no layer axis."""
    x = rms_norm(h_btd, w["attn_norm"], cfg.norm_eps)
    h_btd = recompute.keep(h_btd + attention(w, x, cos_sin, attend, cfg))
    return recompute.keep(h_btd + mlp(w, rms_norm(h_btd, w["mlp_norm"], cfg.norm_eps), cfg))


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


def window_kinds(cfg: ModelConfig) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """The distinct sliding windows of the model, and which of them each of the L layers uses."""
    kinds = tuple(dict.fromkeys(cfg.windows))
    return kinds, tuple(kinds.index(window) for window in cfg.windows)


def hidden(
    params: Params,
    batch: Batch,
    cfg: ModelConfig,
    *,
    dtype: Any,
    gates_bl: jax.Array | None = None,
    layer_ids: jax.Array | None = None,
    remat: str = "layer",
    observe: Callable[..., Any] | None = None,
    beside: Any = None,
) -> Any:
    """Final hidden states [B, T, D] in `dtype`, after the last norm: what the head reads.

    gates_bl: float32 [B, L] of 0 and 1, a mask a row; a gate of 0 skips the layer exactly, and the
      gradient reaches every gate (see gate.py).
    layer_ids: int32 [K]: run only these layers, in this order, without copying their weights.
    remat: what backward recomputes, see recompute.py: "layer" each layer from its input, "none"
      nothing, "selective" and "elementwise" what is cheap for the memory it would take.
    observe: statistics of (residual stream into, out of) each layer; then the result is a pair
      (hidden states, statistics stacked on axis 0). Layer outputs are before the final norm.
    beside: arrays [layers run, …], of which a layer's are a third argument of `observe`.
    """
    assert layer_ids is None or gates_bl is None, "gates are of the whole stack"
    apply = applier(batch, cfg, dtype)

    def body(h: jax.Array, xs: tuple) -> tuple[jax.Array, Any]:
        w, index, gate_b, more = xs
        y = apply(weights_of(params, index) if w is None else w, h, index)
        stats = None if observe is None else observe(h, y, *([] if more is None else [more]))
        return (y if gate_b is None else apply_gate(h, y, gate_b)), stats

    layers, ids = params["layers"], jnp.arange(cfg.num_layers)
    if layer_ids is not None:
        layers, ids = None, jnp.asarray(layer_ids, jnp.int32)
    xs = layers, ids, None if gates_bl is None else gates_bl.T, beside
    h = embed(params, batch.tokens, dtype)
    h, stats = jax.lax.scan(recompute.checkpoint(body, remat), h, xs)
    h = last_norm(params, h, cfg)
    return h if observe is None else (h, stats)


def last_norm(params: Params, h_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The residual stream after all layers -> what the head reads."""
    return rms_norm(h_btd, params["final_norm"], cfg.norm_eps)


def applier(
    batch: Batch, cfg: ModelConfig, dtype: Any
) -> Callable[[Params, jax.Array, Any], jax.Array]:
    """A (weights, residual stream, index of the layer) -> residual stream after it, for a batch."""
    cos_sin = rope.angles(batch.positions, cfg.rope, cfg.head_dim)
    kinds, kind_of = window_kinds(cfg)
    kind_l = jnp.asarray(kind_of, jnp.int32)
    attend = make_attention(batch.segments, kinds, cfg.head_dim, dtype, batch.documents)

    def apply(w: Params, h: jax.Array, index: Any) -> jax.Array:
        return layer(w, h, cos_sin, functools.partial(attend, kind_l[index]), cfg)

    return apply


def head(params: Params, cfg: ModelConfig) -> jax.Array:
    """Output head [V, D], as stored."""
    return params["embed" if cfg.tied else "head"]


def wide_product(expr: str, a: jax.Array, b: jax.Array, out: Any) -> jax.Array:
    """float32 einsum, multiplied in the dtype of `a`, with the sharding `out`."""
    return jnp.einsum(
        expr,
        a,
        b.astype(a.dtype),
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=out,
    )


def unembed(h_btd: jax.Array, head_vd: jax.Array) -> jax.Array:
    """float32 logits [B, T, V], multiplied in the dtype of `h_btd`."""
    out = mesh.out(("batch", None, "vocab"), (*h_btd.shape[:2], head_vd.shape[0]))
    return wide_product("btd,vd->btv", h_btd, head_vd, out)


def logits(params: Params, h_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """float32 [B, T, V]; for short sequences (decoding, tests): losses never form it whole."""
    return unembed(h_btd, mesh.gather(head(params, cfg), ("vocab", "embed")))
