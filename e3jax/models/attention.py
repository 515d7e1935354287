"""Causal grouped-query attention over packed rows: who sees whom, and which program computes it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e3jax import devices, mesh
from e3jax.models import cudnn, recompute, splash
from e3jax.models.config import ModelConfig
from e3jax.models.product import precision

Attend = Callable[..., jax.Array]  # of q, k and v, and sinks where the model has them
AttendOfKind = Callable[..., jax.Array]  # of the layer's kind and these


def scaled(q: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Queries of which an attention that divides their products by sqrt(H) makes the scores of a
    model that multiplies by something else."""
    scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    factor = scale * q.shape[-1] ** 0.5
    if math.isclose(factor, 1.0, rel_tol=1e-9):
        return q
    # In float32: a factor rounded to bfloat16 would move all scores one way.
    return (q.astype(jnp.float32) * factor).astype(q.dtype)


def make_attention(
    segments_bt: jax.Array,
    windows: Sequence[int | None],
    head_dim: int,
    dtype: Any,
    documents: int | None,
    cap: float | None = None,
    sinks: bool = False,
) -> AttendOfKind:
    """A (kind, q [B, T, K, G, H], k and v [B, T, K, H]) -> [B, T, K, G, H]: rows see themselves.
    The values may be narrower, and then what is returned is.

    kind: int32 scalar, which of the distinct `windows` the layer has. documents: that a row has at
    most, None where that is not known. cap: of the scores, soft. sinks: it is given those of the
    layer too, [K, G], see `attend_by_head`.
    """
    time, platform = segments_bt.shape[1], devices.platform()
    if platform == "tpu" and splash.suits(time, head_dim):
        return by_splash(segments_bt, windows, cap)
    if cap is not None or sinks:  # cuDNN's attention, as JAX calls it, has neither
        return by_mask(segments_bt, windows, cap)
    whole = see_all(windows, time)
    if platform == "gpu" and whole and devices.is_stood_for():
        if cudnn.takes(time, head_dim, dtype, documents or 1):
            return _as_wide(lambda kind, q, k, v: _memory_of_kernel(q, k, v))
    elif platform == "gpu" and whole and cudnn.suits(time, head_dim, dtype, documents):
        return by_cudnn(segments_bt, documents or 1)
    return by_mask(segments_bt, windows)


def see_all(windows: Sequence[int | None], time: int) -> bool:
    """Whether no sliding window hides anything in rows of `time` tokens."""
    return all(window is None or window >= time for window in windows)


def by_splash(
    segments_bt: jax.Array, windows: Sequence[int | None], cap: float | None = None
) -> AttendOfKind:
    """Splash attention on TPUs, a kernel for each window: nothing of [T, T] is built."""
    kernels = [splash.make_attention(segments_bt, window, cap) for window in windows]
    return _as_wide(lambda kind, *arrays: jax.lax.switch(kind, kernels, *arrays))


def by_cudnn(segments_bt: jax.Array, documents: int) -> AttendOfKind:
    """cuDNN's attention on GPUs, without windows: nothing of [T, T] is built."""
    attend = cudnn.make_attention(segments_bt, documents)
    return _as_wide(lambda kind, q, k, v: attend(q, k, v))


def _as_wide(attend: AttendOfKind) -> AttendOfKind:
    """Values as wide as keys, for kernels that ask for it: filled up with zeros, and cut again."""

    def with_values(
        kind: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array
    ) -> jax.Array:
        width = v.shape[-1]
        if width == k.shape[-1]:
            return attend(kind, q, k, v, *sinks)
        filled = jnp.pad(v, ((0, 0),) * 3 + ((0, k.shape[-1] - width),))
        return attend(kind, q, k, filled, *sinks)[..., :width]

    return with_values


def by_mask(
    segments_bt: jax.Array, windows: Sequence[int | None], cap: float | None = None
) -> AttendOfKind:
    """Plain XLA with dense masks [B, T, T], made here once for all layers."""
    masks = [causal_mask(segments_bt, window) for window in windows]

    def with_mask(
        kind: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None
    ) -> jax.Array:
        return recompute.keep(attend(q, k, v, select_mask(kind, masks), cap, sinks))

    return with_mask


def causal_mask(
    segments_bs: jax.Array,
    window: int | None,
    first: jax.Array | int = 0,
    count: int | None = None,
) -> jax.Array:
    """Bool [B, T, S]: query t may see key s: same document, not later, within `window` tokens.

    The queries are the tokens `first` to `first + count` of the row; by default all.
    """
    s = jnp.arange(segments_bs.shape[1])
    count = len(s) if count is None else count
    t, segments_bt = (
        jax.lax.dynamic_slice_in_dim(x, first, count, axis=-1) for x in (s, segments_bs)
    )
    visible = t[:, None] >= s[None, :]
    if window is not None:
        visible &= t[:, None] - s[None, :] < window
    return visible & (segments_bt[:, :, None] == segments_bs[:, None, :])


def select_mask(kind: jax.Array, masks: Sequence[jax.Array]) -> jax.Array:
    """The mask of a layer's kind."""
    return masks[0] if len(masks) == 1 else jax.lax.select_n(jnp.int32(kind), *masks)


def attend(
    q_btkgh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    mask_bts: jax.Array,
    cap: float | None = None,
    sinks_kg: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v, scores and softmax in float32; returns [B, T, K, G, H] like q.

    A query that sees no key gets the mean of the values, not NaN.
    """
    k, v = k_bskh.transpose(0, 2, 1, 3), v_bskh.transpose(0, 2, 1, 3)
    return attend_by_head(q_btkgh, k, v, mask_bts, cap, sinks_kg)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap): as x where x is small, and never beyond the cap. None: x itself."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend_by_head(
    q_btkgh: jax.Array,
    k_bksh: jax.Array,
    v_bksh: jax.Array,
    mask_bts: jax.Array,
    cap: float | None = None,
    sinks_kg: jax.Array | None = None,
) -> jax.Array:
    """`attend` for keys and values that lie head by head, as the products want them.

    sinks: of each head a score more than there are keys, to nothing: so its weights add up to less
    than one (gpt-oss, arXiv 2508.10925).
    """
    rows, time, kv_heads, groups, width = q_btkgh.shape  # the values' may be another
    # The queries of a key-value head as one matrix: on a CPU 14 times faster than the plain einsum,
    # which XLA turns into a loop of small products.
    q = q_btkgh.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, groups * time, width)
    # The queries' axis is that of groups, times the time.
    place = mesh.out(("batch", "heads", "groups", None), (rows, kv_heads, groups, 1))
    scores = jnp.einsum(
        "bkqh,bksh->bkqs",
        q,
        k_bksh,
        precision=precision(q.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=place,
    )
    scores = scores.reshape(rows, kv_heads, groups, time, -1) * width**-0.5
    scores = soft_cap(scores, cap)
    scores = jnp.where(mask_bts[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks_kg is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v_bksh.dtype)
    else:
        sinks = sinks_kg.astype(jnp.float32)[None, :, :, None, None]
        most = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
        weights = jnp.exp(scores - most)
        total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - most)
        weights = (weights / total).astype(v_bksh.dtype)
    weights = weights.reshape(rows, kv_heads, groups * time, -1)
    y = jnp.einsum(
        "bkqs,bksh->bkqh",
        weights,
        v_bksh,
        precision=precision(v_bksh.dtype),
        out_sharding=place,
    )
    return y.reshape(rows, kv_heads, groups, time, -1).transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _memory_of_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Something that needs the memory of cuDNN's attention and is no attention: for plans."""
    return q + k[..., None, :] + v[..., None, :]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    y = recompute.keep(_memory_of_kernel(q, k, v))
    normaliser = recompute.keep(jnp.sum(y.astype(jnp.float32), axis=-1))
    return y, (q, k, v, y, normaliser)


def _backward(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, y, normaliser = kept
    d_q = (g * (q + y) * normaliser[..., None]).astype(q.dtype)
    d_k = jnp.sum(d_q, axis=3)
    return d_q, d_k * v, d_k * k


_memory_of_kernel.defvjp(_forward, _backward)
