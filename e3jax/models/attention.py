"""Causal grouped-query attention over packed rows."""

import jax
import jax.numpy as jnp

from e3jax import mesh


def causal_mask(segments_bt: jax.Array, window: int | None) -> jax.Array:
    """Bool [B, T, T]: query t may see key s: same document, not later, within `window` tokens."""
    t = jnp.arange(segments_bt.shape[1])
    visible = t[:, None] >= t[None, :]
    if window is not None:
        visible &= t[:, None] - t[None, :] < window
    return visible & (segments_bt[:, :, None] == segments_bt[:, None, :])


def attend(
    q_btkgh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, mask_bts: jax.Array, precision=None
) -> jax.Array:
    """softmax(q k / sqrt(H)) v, scores and softmax in float32; returns [B, T, K, G, H] like q.

    A query that sees no key gets the mean of the values, not NaN.
    """
    rows, time, kv_heads, groups, width = q_btkgh.shape
    # The queries of a key-value head as one matrix: on a CPU 14 times faster than the plain einsum,
    # which XLA turns into a loop of small products.
    q = q_btkgh.transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, groups * time, width)
    k, v = k_bskh.transpose(0, 2, 1, 3), v_bskh.transpose(0, 2, 1, 3)
    place = mesh.out(("batch", "heads", None, None), (rows, kv_heads, 1, 1))
    scores = jnp.einsum(
        "bkqh,bksh->bkqs",
        q,
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=place,
    )
    scores = scores.reshape(rows, kv_heads, groups, time, -1) * width**-0.5
    scores = jnp.where(mask_bts[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(rows, kv_heads, groups * time, -1)
    y = jnp.einsum("bkqs,bksh->bkqh", weights, v, precision=precision, out_sharding=place)
    return y.reshape(rows, kv_heads, groups, time, width).transpose(0, 3, 1, 2, 4)
