"""Products in float8 for a model that is only run forward: `distill.float8`.

Every row of the activations and every output of a matrix has a scale of its own, taken when it is
needed: nothing is calibrated, and there is no second copy of the weights. On Hoppers kernels round
the activations (hopper/rows.py), and a SwiGLU's two matrices have one scale each.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import devices, mesh
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


class Rounded(NamedTuple):
    """What was of `dtype`, as numbers in e4m3 times a scale of each index of its first axes."""

    numbers: jax.Array
    scale: jax.Array  # float32
    dtype: Any


Activations = jax.Array | Rounded


def product(expr: str, x: Activations, w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """einsum of activations [B, T, ...] and a weight, both rounded to e4m3: float32.

    What is summed over are the last axes of both; the result has B, T and the weight's others.
    """
    x = of_tokens(x)
    numbers, w_scale, _ = rounded(w, len(axes) - 2)
    y = _multiplied(expr, x, numbers, axes)
    x_scale = jnp.expand_dims(x.scale, tuple(range(2, len(axes))))
    if mesh.current() is not None:  # the matrix is kept in other parts than the result has
        w_scale = jax.sharding.reshard(w_scale, mesh.spec(axes[2:], w_scale.shape))
    return y.astype(jnp.float32) * x_scale * w_scale


def of_tokens(x: Activations) -> Rounded:
    """Activations [B, T, ...], rounded by the greatest of each token."""
    if isinstance(x, Rounded):
        return x
    if not _by_kernel(x):
        return rounded(x, 2)
    from e3jax.hopper import rows

    def of_own(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        numbers, scale = rows.rounded_rows(x.reshape(len(x), -1))
        return numbers.reshape(x.shape), scale

    numbers, scale = mesh.on_own_tokens(of_own, x)
    return Rounded(numbers, scale, x.dtype)


def normed(x_btd: jax.Array, weight: jax.Array, eps: float) -> Rounded:
    """The root-mean-square norm, times [D], rounded by the greatest of each token: by a kernel,
    where matrices `read_rounded`."""
    from e3jax.hopper import rows

    norm = functools.partial(rows.rounded_norm, eps=eps)
    numbers, scale = mesh.on_own_tokens(norm, x_btd, whole=[weight.astype(jnp.float32)])
    return Rounded(numbers, scale, x_btd.dtype)


def read_rounded(x_btd: jax.Array, *matrices: Any) -> bool:
    """Whether all these are Float8, for whom a kernel rounds x."""
    return all(isinstance(w, Float8) for w in matrices) and _by_kernel(x_btd)


def _by_kernel(x: jax.Array) -> bool:
    """Whether a kernel rounds these [B, T, ...]: on a Hopper that has each token's whole."""
    if x.dtype != jnp.bfloat16 or not devices.is_hopper():
        return False
    from e3jax.hopper import rows

    parts = any(mesh.is_sharded(x, axis) for axis in range(1, x.ndim))
    return not parts and rows.fits(math.prod(x.shape[2:]))


def silu_gated(x_btd: Activations, gate: Float8, up: Float8) -> Rounded:
    """silu(gate x) * (up x), [B, T, F], matrices [F, D], rounded for the next product: by a kernel,
    where `has_kernel`."""
    from e3jax.hopper import rows

    x = of_tokens(x_btd)

    def multiplied(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        numbers, scale, _ = rounded(w, 0)
        y = _multiplied("btd,fd->btf", x, numbers, ("batch", None, "mlp"))
        return y, x.scale * scale

    products = (*multiplied(gate.matrix), *multiplied(up.matrix))
    numbers, scale = mesh.on_own_tokens(rows.rounded_silu, *products)
    return Rounded(numbers, scale, x.dtype)


def has_kernel(gate: Any, up: Any) -> bool:
    """Whether `silu_gated` takes these: Float8 of [F, D], on a Hopper that has whole rows of F."""
    if not isinstance(gate, Float8) or not devices.is_hopper() or mesh.is_sharded(up.matrix, 0):
        return False
    from e3jax.hopper import rows

    return rows.fits(len(up.matrix), arrays=2)


def _multiplied(expr: str, x: Rounded, w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The product of the numbers, bfloat16."""
    shape = (*x.scale.shape, *w.shape[: len(axes) - 2])
    return jnp.einsum(
        expr, x.numbers, w, preferred_element_type=jnp.bfloat16, out_sharding=mesh.out(axes, shape)
    )


def rounded(x: jax.Array, rows: int) -> Rounded:
    """The numbers nearest to x / scale; scale is of the first `rows` axes, so that none is too
    great."""
    wide = x.astype(jnp.float32)
    last = tuple(range(rows, x.ndim))
    top = jnp.maximum(jnp.max(jnp.abs(wide), axis=last), TINY)
    # Not divided by the scale: a GPU's division would take as long as reading the numbers.
    numbers = (wide * jnp.expand_dims(GREATEST / top, last)).astype(E4M3)
    return Rounded(numbers, top / GREATEST, x.dtype)
