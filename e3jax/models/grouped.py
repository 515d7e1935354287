"""Products of rows with the matrix of their group: how rows are laid group after group, and back.

Nothing is padded to a greatest group and nothing dropped. `jax.lax.ragged_dot` multiplies groups
of any length; on NVIDIA's Hopper, where XLA's multiplies every row by every matrix, each group
starts a block of its own (at most a block a group more) and the kernels of hopper/grouped.py
multiply blocks.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from e3jax import devices
from e3jax.models.params import Params
from e3jax.models.product import precision


class Groups(NamedTuple):
    """Where A rows of E groups lie in M places. Rows of no group are nowhere: their answer is 0."""

    row: jax.Array  # int32 [M]: the row in a place, A or more where there is none
    place: jax.Array  # int32 [A]: the place of a row, M or more where it has none
    sizes: jax.Array  # int32 [E], places of each group, its last block filled up
    block: int  # places that belong to one group together

    def send(self, x_ad: jax.Array) -> jax.Array:
        """[A, D] rows -> [M, D], zeros where there is none."""
        return _taken(x_ad, self.row)

    def bring(self, y_md: jax.Array) -> jax.Array:
        """[M, D] -> [A, D]: back in the rows' order."""
        return _taken(y_md, self.place)

    def product(self, x_md: jax.Array, matrices: jax.Array, axis: int) -> jax.Array:
        """Places times the matrix of their group, summed over this axis (1 or 2) of the matrices
        [E, ...]. What belongs to no group is not to be looked at."""
        if self.block > 1:
            blocks = self.of(jnp.arange(len(x_md) // self.block) * self.block)
            from e3jax.hopper import grouped as kernels

            return kernels.product(x_md, matrices, blocks, axis)
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (axis,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        return jax.lax.ragged_dot_general(
            x_md, matrices, self.sizes, numbers, precision=precision(x_md.dtype)
        )

    def of(self, places: jax.Array) -> jax.Array:
        """int32: the group of each of these places, E where it has none."""
        ends = jnp.cumsum(self.sizes)
        return jnp.searchsorted(ends, places, side="right", method="compare_all").astype(jnp.int32)

    def of_rows(self) -> jax.Array:
        """int32 [M]: a group for every place, the last where it has none."""
        return jnp.minimum(self.of(jnp.arange(len(self.row))), len(self.sizes) - 1)


def block_of(matrices: Params, dtype: Any) -> int:
    """Places of a block, for products of these matrices: 1 where `ragged_dot` is to multiply."""
    if dtype not in (jnp.bfloat16, jnp.float16) or not devices.is_hopper():
        return 1
    from e3jax.hopper import grouped as kernels

    shapes = [x.shape for x in matrices.values() if x.ndim > 2]  # the others are biases
    widths = [width for _, first, *rest in shapes for width in (first, math.prod(rest))]
    return kernels.BLOCK if all(width % kernels.DEPTH == 0 for width in widths) else 1


def lay(group_a: jax.Array, count: int, block: int) -> Groups:
    """Rows in order of their group, int32 [A] of 0 to count; count stands for none. Rows of a group
    keep their order: the same sums whatever else there is."""
    rows = len(group_a)
    places = -(-(rows + count * (block - 1)) // block) * block
    order = jnp.argsort(group_a).astype(jnp.int32)  # stable
    sizes = jnp.sum(group_a[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    filled = -(-sizes // block) * block
    # Of each group and of none: how many places further its rows lie than without blocks.
    shift = jnp.cumsum(filled - sizes) - (filled - sizes)
    shift = jnp.append(shift, places)
    place = jnp.arange(rows, dtype=jnp.int32) + shift[group_a[order]]
    row = jnp.arange(rows, rows + places, dtype=jnp.int32)
    row = row.at[place].set(order, mode="drop", unique_indices=True)
    place = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    return Groups(row, place, filled, block)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x, zeros where the index is beyond: each index comes once, those beyond too, so the
    backward pass adds nothing up."""
    return x.at[index].get(mode="fill", fill_value=0, unique_indices=True)
