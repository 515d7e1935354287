"""The norms in float32, and that of queries and keys together with their rotation."""

import functools

import jax
import jax.numpy as jnp

from e3jax.models import recompute, rope
from e3jax.models.config import ModelConfig
from e3jax.models.params import Params


def norm(w: Params, name: str, x_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The model's norm `name` of [B, T, D]; x itself where the model has none there."""
    if name not in w:
        return x_btd
    scale = scale_of(w, name, cfg)
    if cfg.norm == "layer":
        return layer_norm(x_btd, scale, w.get(f"{name}_bias"), cfg.norm_eps)
    return rms_norm(x_btd, scale, cfg.norm_eps)


def scale_of(w: Params, name: str, cfg: ModelConfig) -> jax.Array:
    """What the norm `name` multiplies by, in float32 where that is not its weight alone."""
    return w[name] if not cfg.norm_offset else w[name].astype(jnp.float32) + cfg.norm_offset


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Norm of the distance from the mean of the last axis (arXiv 1607.06450), in float32; x's
    dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = wide * _factor(wide, eps) * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, axes: int = 1) -> jax.Array:
    """Root-mean-square norm over the last `axes`, those of `scale`, in float32; x's dtype."""
    wide = x.astype(jnp.float32)
    return (wide * _factor(wide, eps, axes) * scale.astype(jnp.float32)).astype(x.dtype)


def _factor(wide: jax.Array, eps: float, axes: int = 1) -> jax.Array:
    """1 / root mean square over the last axes, which stay as 1."""
    last = tuple(range(-axes, 0))
    mean_square = recompute.keep(jnp.mean(wide * wide, axis=last))  # a number a row, a pass to make
    return jax.lax.rsqrt(jnp.expand_dims(mean_square, last) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm_rotate(
    x: jax.Array, scale: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float
) -> jax.Array:
    """`rope.rotate(rms_norm(x, scale, eps), cos_sin)` of [B, T, ..., H], in x's dtype; no gradient
    for the angles.

    The factor comes after the rotation, and backward adds up over the two halves that a rotation
    mixes: with a concatenation between XLA writes whole float32 arrays, and reads them again.
    """
    return _forward(x, scale, cos_sin, eps)[0]


def _forward(x: jax.Array, scale: jax.Array, cos_sin: tuple[jax.Array, jax.Array], eps: float):
    wide = x.astype(jnp.float32)
    factor = _factor(wide, eps)
    y = rope.rotate(wide * scale.astype(jnp.float32), cos_sin) * factor
    return y.astype(x.dtype), (x, scale, cos_sin, factor)


def _backward(eps: float, kept: tuple, g: jax.Array):
    x, scale, cos_sin, factor = kept
    cos, sin = rope.for_heads(cos_sin, x.ndim)
    g1, g2, x1, x2, s1, s2 = (
        half for a in (g, x, scale) for half in jnp.split(a.astype(jnp.float32), 2, axis=-1)
    )
    g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin  # turned back
    along = jnp.sum(g1 * x1 * s1 + g2 * x2 * s2, axis=-1, keepdims=True)
    shrink = factor**3 * along / x.shape[-1]
    d_x = [g * s * factor - shrink * x for g, s, x in ((g1, s1, x1), (g2, s2, x2))]
    rows = tuple(range(x.ndim - 1))
    d_scale = [jnp.sum(g * x * factor, axis=rows) for g, x in ((g1, x1), (g2, x2))]
    join = functools.partial(jnp.concatenate, axis=-1)
    return join(d_x).astype(x.dtype), join(d_scale).astype(scale.dtype), None


norm_rotate.defvjp(_forward, _backward)
