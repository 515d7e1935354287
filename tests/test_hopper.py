"""The kernels for Hopper are lowered for it by every JAX; not every one can interpret them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from e3jax.hopper import gated, grouped, sums


def arrays(*shapes_and_types):
    return [jax.ShapeDtypeStruct(*each) for each in shapes_and_types]


LOGITS, ROW = ((64, 151_936), jnp.float32), ((64,), jnp.float32)
HALF = ((256, 9728), jnp.bfloat16), ((256,), jnp.float32)
KERNELS = {
    "sums": (sums.row_sums, arrays(LOGITS, LOGITS, ROW, ROW, ((64,), jnp.int32))),
    "gated": (gated.rounded_silu, arrays(*HALF, *HALF)),
    "grouped": (
        functools.partial(grouped.product, axis=2),
        arrays(((512, 128), jnp.bfloat16), ((8, 192, 128), jnp.bfloat16), ((4,), jnp.int32)),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_lowered(name):
    kernel, shapes = KERNELS[name]
    lowered = jax.jit(kernel).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in lowered


def test_which_rows_fit():
    assert all(map(gated.fits, (512, 6144, 9728, 17_408, 25_088)))
    assert not any(map(gated.fits, (11_008, 25_600)))  # no multiple of 512; no shared memory for it
