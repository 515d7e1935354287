"""Products of activations and weights, placed on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models import float8


def precision(dtype: Any) -> jax.lax.Precision | None:
    """float32 means float32: without this an accelerator multiplies in tf32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def project(
    expr: str, x: float8.Activations, w: jax.Array | float8.Float8, axes: tuple[str | None, ...]
) -> jax.Array:
    """einsum of activations and a weight, in the activations' dtype, with the result's sharding.

    Letters that are summed over must be in the order of their axes by the alphabet, in which einsum
    sums: else XLA transposes both operands.
    """
    if isinstance(w, float8.Float8):
        return float8.product(expr, x, w.matrix, axes).astype(x.dtype)
    assert not isinstance(x, float8.Rounded)
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
