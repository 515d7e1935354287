"""What backward keeps of a layer and what it computes again.

`selective` keeps what saves most work a byte. A layer of Qwen3-32B in bfloat16 (D 5120, N H 8192,
K H 1024, F 25600; forward 1042 MFLOP a token on rows of 4096 tokens):

    array                          KB a token   FLOPs saved a byte
    layer's output                     10        F = 25600   used by the gates of the search only
    stream after attention             10        N H = 8192
    attention's output                 16        T = 4096    at half a matrix product's speed
    q, k, v before norm and rope       20        D = 5120
    gate and up of the mlp            100        D = 5120    not kept: half of all there is to keep

Beside each layer's input (10 KB) it keeps 46 KB, 36 of them divided by the model axis, and computes
again the 524 MFLOP of gate and up, where `layer` does 780; in the search 56 KB, and 524 for 1042.

`elementwise` keeps gate and up too: no product is computed again, only norms, rotations, activation
and gates, of which `none` keeps every intermediate result.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from e3jax import devices
from e3jax.models import cudnn

Remat = Literal["none", "elementwise", "selective", "layer"]
KEPT, LARGE = "kept", "large"


def keep(x: jax.Array) -> jax.Array:
    """Marks an array that `selective` and `elementwise` keep."""
    return checkpoint_name(x, KEPT)


def keep_large(x: jax.Array) -> jax.Array:
    """Marks an array that `elementwise` alone keeps."""
    return checkpoint_name(x, LARGE)


def checkpoint(body: Callable, remat: Remat) -> Callable:
    """The body of a scan over layers; its arguments, the residual stream too, are always kept."""
    if remat == "none":
        return body
    marks = {"layer": (), "selective": (KEPT,), "elementwise": (KEPT, LARGE)}[remat]
    marked = jax.checkpoint_policies.save_only_these_names(*marks)

    def kept(primitive: Any, *avals: Any, **params: Any) -> bool:
        kernel = primitive.name == cudnn.FORWARD and marks != ()  # which marks nothing itself
        return kernel or marked(primitive, *avals, **params)

    return jax.checkpoint(body, prevent_cse=False, policy=kept)


def compiler_options() -> dict[str, bool]:
    """Of XLA, for the `jax.jit` of a step on the mesh that is set.

    On GPUs: what a scan keeps for backward is not filled with zeros before it is written, which
    takes 6.6 of the 394 ms of a search step of 16,384 tokens (Qwen3-1.7B, H200).
    """
    if devices.platform() != "gpu" or devices.is_stood_for():
        return {}
    return {"xla_gpu_enable_dus_accumulator_zero_init_elimination": True}
