"""The gate of a layer: exact selection forward, the derivative of scaling the layer backward.

A layer with gate m computes h' = h + m (Layer(h) - h), with m 0 or 1.
"""

import jax
import jax.numpy as jnp


def choose_rows(of_b: jax.Array, these: jax.Array, others: jax.Array) -> jax.Array:
    """Rows of `these` [B, T, D] where the bool [B] says so, of `others` elsewhere."""
    return jnp.where(of_b.reshape(of_b.shape + (1,) * (these.ndim - of_b.ndim)), these, others)


@jax.custom_vjp
def apply_gate(h: jax.Array, h_new: jax.Array, m_b: jax.Array) -> jax.Array:
    """Keep (1) or skip (0) a layer for each row.

    h, h_new: [B, T, D], residual stream before and after the layer; m_b: float32 [B], 0 or 1.
    Forward selects, since in bfloat16 h + (h_new - h) is not h_new: a masked model equals the
    sliced one bit for bit. The gradient of m is <dL/dh', h_new - h> in float32, for kept and
    removed layers alike.
    """
    return choose_rows(m_b > 0, h_new, h)


def _forward(h: jax.Array, h_new: jax.Array, m_b: jax.Array):
    return apply_gate(h, h_new, m_b), (h, h_new, m_b)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array):
    h, h_new, m_b = saved
    kept, zero = m_b > 0, jnp.zeros_like(g)
    update = h_new.astype(jnp.float32) - h.astype(jnp.float32)
    over = tuple(range(m_b.ndim, h.ndim))
    d_m = jnp.sum(g.astype(jnp.float32) * update, axis=over)
    return choose_rows(kept, zero, g), choose_rows(kept, g, zero), d_m.astype(m_b.dtype)


apply_gate.defvjp(_forward, _backward)
