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
    heads = ("batch", "heads", None, None, None)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts",
        q_btkgh,
        k_bskh,
        precision=precision,
        preferred_element_type=jnp.float32,
        out_sharding=mesh.out(heads, (q_btkgh.shape[0], q_btkgh.shape[2], 1, 1, 1)),
    )
    scores = scores * q_btkgh.shape[-1] ** -0.5
    scores = jnp.where(mask_bts[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_bskh.dtype)
    return jnp.einsum(
        "bkgts,bskh->btkgh",
        weights,
        v_bskh,
        precision=precision,
        out_sharding=mesh.out(
            ("batch", None, "heads", None, None), (*q_btkgh.shape[:2], q_btkgh.shape[2], 1, 1)
        ),
    )
