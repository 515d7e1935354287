"""Kernels for NVIDIA's Hopper in Pallas, which is imported with them, where they are needed."""

from jax.experimental.pallas import mosaic_gpu as gpu

PROCESSORS = 132  # of a Hopper
SHARED = 227 * 1024  # bytes of shared memory that a processor's programs have


def kernel(body, out, *, programs: int = 1, approximate: bool = False):
    """A kernel of so many programs a multiprocessor, along the axis `sm`, each a warpgroup.

    out: ShapeDtypeStructs of what it writes. approximate: exponentials and roots to some 1e-6.
    """
    return gpu.kernel(
        body,
        out_type=out,
        grid=(PROCESSORS * programs,),
        grid_names=("sm",),
        compiler_params=gpu.CompilerParams(
            lowering_semantics=gpu.LoweringSemantics.Warpgroup, approx_math=approximate
        ),
    )
