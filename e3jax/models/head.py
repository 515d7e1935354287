"""The output head: a matrix, and what is done to its products to make logits of them."""

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models.attention import soft_cap
from e3jax.models.product import wide_product

AXES = ("vocab", "embed")


@flax.struct.dataclass
class Head:
    """What reads final hidden states. A pytree of its matrix: the rest are constants."""

    matrix: jax.Array  # [V, D]
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    cap: float | None = flax.struct.field(pytree_node=False, default=None)


def as_head(head: Head | jax.Array) -> Head:
    """A matrix alone is a head whose products are the logits."""
    return head if isinstance(head, Head) else Head(head)


def gathered(head: Head, dtype: jnp.dtype) -> Head:
    """The head in `dtype`, whole along the width on every device."""
    return head.replace(matrix=mesh.gather(head.matrix.astype(dtype), AXES))


def products(h_btd: jax.Array, head_vd: jax.Array) -> jax.Array:
    """float32 [B, T, V], multiplied in the dtype of `h_btd`."""
    out = mesh.out(("batch", None, "vocab"), (*h_btd.shape[:2], head_vd.shape[0]))
    return wide_product("btd,vd->btv", h_btd, head_vd, out)


def finished(products_btv: jax.Array, head: Head) -> jax.Array:
    """Logits of the head's products: the one place that knows the scale and the cap."""
    scaled = products_btv if head.scale == 1.0 else products_btv * head.scale
    return soft_cap(scaled, head.cap)


def unembed(h_btd: jax.Array, head: Head) -> jax.Array:
    """float32 logits [B, T, V] of hidden states, by a head that is whole along the width."""
    return finished(products(h_btd, head.matrix), head)
