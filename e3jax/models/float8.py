"""Products in float8 for a model that is only run forward: `distill.float8`.

Every row of the activations and every output of a matrix has a scale of its own, taken when it is
needed: nothing is calibrated, and there is no second copy of the weights.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models.config import ModelConfig

E4M3 = jnp.float8_e4m3fn
GREATEST = float(jnp.finfo(E4M3).max)  # 448
TINY = 1e-30  # the greatest of a row of zeros
LARGE = ("q", "k", "v", "o", "gate", "up", "down", "shared_gate", "shared_up", "shared_down")


@flax.struct.dataclass
class Float8:
    """A matrix of any dtype whose products are to be in float8."""

    matrix: jax.Array


def marked(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The same parameters, the layers' large matrices as Float8: all but embeddings, head, routers,
    experts, and those by which latent attention compresses and expands."""
    marks = {
        stack: {name: Float8(w) if name in LARGE else w for name, w in params[stack].items()}
        for stack in cfg.stacks
    }
    return params | marks


def product(expr: str, x: jax.Array, w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """einsum of activations and a weight, both rounded to e4m3: float32.

    What is summed over are the last axes of both; the result has the others, those of x first.
    """
    of_y = expr.split("->")[1]
    rows = sum(letter in of_y for letter in expr.split(",")[0])
    x, x_scale = _rounded(x, rows)
    w, w_scale = _rounded(w, len(of_y) - rows)
    shape = (*x.shape[:rows], *w_scale.shape)
    y = jnp.einsum(
        expr, x, w, preferred_element_type=jnp.bfloat16, out_sharding=mesh.out(axes, shape)
    )
    x_scale = jnp.expand_dims(x_scale, tuple(range(rows, len(of_y))))
    if mesh.current() is not None:  # the matrix is kept in other parts than the result has
        w_scale = jax.sharding.reshard(w_scale, mesh.spec(axes[rows:], w_scale.shape))
    return y.astype(jnp.float32) * x_scale * w_scale


def _rounded(x: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """(x / scale in e4m3, scale): float32, of the first `rows` axes, so that none is too great."""
    wide = x.astype(jnp.float32)
    last = tuple(range(rows, x.ndim))
    top = jnp.maximum(jnp.max(jnp.abs(wide), axis=last), TINY)
    # Not divided by the scale: a GPU's division would take as long as reading the numbers.
    return (wide * jnp.expand_dims(GREATEST / top, last)).astype(E4M3), top / GREATEST
