"""Stage 2: entropy-aware distillation of the pruned model, and plain training by the same step.

The student is the surviving layers, embeddings, last norm and head, all trained: float32 master
weights and moments, compute in `dtype`. The teacher is the dense model (online), its stored top-k
(cache), or nobody (next-token cross-entropy).
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from e3jax import config, mesh
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.training import optim


@flax.struct.dataclass
class TrainState:
    """Everything training carries from step to step; all of it is checkpointed."""

    step: jax.Array  # int32, batches seen
    params: Params  # float32
    opt_state: Any
    mean_entropy: jax.Array  # float32, H of the weights w = H_t / H: nats a token, a constant
    skipped: jax.Array  # int32, steps left out because they were not finite


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mean_entropy: float
) -> TrainState:
    """The state before the first step; the moments are born with the parameters' shardings."""
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    return TrainState(
        step=mesh.replicate(jnp.int32(0)),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        mean_entropy=mesh.replicate(jnp.float32(mean_entropy)),
        skipped=mesh.replicate(jnp.int32(0)),
    )
