"""Selectors by the layers' matrices: their magnitude, alone or times the gradient.

Norms and biases do not count. Sums within a matrix are float32, over matrices float64.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.progress import over
from e3jax.selectors import selection
from e3jax.selectors.selection import Calibration, Selection, Task


def magnitude(calibration: Calibration, task: Task) -> Selection:
    """The layers of least sum |W|: a control, which looks at no data. scores: that sum."""
    cfg = calibration.cfg
    return selection.lowest(task, _absolute_sums(cfg, matrices(calibration.params, cfg)))


def taylor(calibration: Calibration, task: Task) -> Selection:
    """Shortened LLaMA (arXiv 2402.02834): the layers of least `taylor_scores`.

    teacher_tokens counts each token once, for a forward and a backward pass.
    """
    scores = taylor_scores(calibration)
    return selection.lowest(task, scores, teacher_tokens=calibration.tokens)


def taylor_plus(calibration: Calibration, task: Task) -> Selection:
    """`taylor` that never removes layers 0 to 3 and the last two, as the paper recommends."""
    layers = range(task.num_layers)
    ends = frozenset(layers[:4]) | frozenset(layers[-2:])
    free = frozenset(layers) - ends - task.protect
    if len(free) < task.remove or not task.force <= free:
        raise UserError(
            f"taylor_plus never removes layers {sorted(ends)}: of the others search.protect leaves "
            f"{sorted(free)} to remove {task.remove} from, {sorted(task.force)} by search.force"
        )
    return taylor(calibration, dataclasses.replace(task, protect=task.protect | ends))


def taylor_scores(calibration: Calibration) -> np.ndarray:
    """sum |W * G| of each layer, float64 [L]; G: the gradient of the mean next-token loss.

    G is added up, signed, over all of the calibration data: a float32 copy of the layers' matrices,
    beside which there is one batch's gradient in the parameters' dtype.
    """
    params, cfg, count = calibration.params, calibration.cfg, 0
    total = _zeros(matrices(params, cfg))
    objective = losses.Objective(chunk=calibration.chunk)
    options = {"cfg": cfg, "dtype": calibration.dtype, "objective": objective}
    for batch in over("gradients", calibration.batches, len(calibration.batches)):
        total, predictions = _add_gradient(total, params, mesh.shard_batch(batch), **options)
        count += int(predictions)
    return _absolute_sums(cfg, matrices(params, cfg), total) / max(count, 1)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "objective"), donate_argnames="total")
def _add_gradient(
    total: Params,
    params: Params,
    batch: Batch,
    *,
    cfg: ModelConfig,
    dtype: Any,
    objective: losses.Objective,
) -> tuple[Params, jax.Array]:
    """total + the gradient of the sum of the tokens' losses; and the number of those tokens."""

    def loss(stacks: Params) -> jax.Array:
        model = params | {name: params[name] | found for name, found in stacks.items()}
        h = decoder.hidden(model, batch, cfg, dtype=dtype)
        head = decoder.head(params, cfg)
        return losses.token_sums(
            h, head, batch.targets, batch.mask, None, objective, frozen_head=True
        )[0]

    gradient = jax.grad(loss)(matrices(params, cfg))
    return jax.tree.map(jnp.add, total, gradient), jnp.sum(batch.mask)


@jax.jit
def _zeros(stacks: Params) -> Params:
    return jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), stacks)


def matrices(params: Params, cfg: ModelConfig) -> Params:
    """Of every stack of layers all parameters but norms and biases."""
    return {
        stack: {name: w for name, w in params[stack].items() if not name.endswith(("norm", "bias"))}
        for stack in cfg.stacks
    }


def _absolute_sums(cfg: ModelConfig, *factors: Params) -> np.ndarray:
    """sum |product of the factors' elements| of each layer, float64 [L]."""
    by_matrix, total = _absolute_sums_by_matrix(*factors), np.zeros(cfg.num_layers)
    for stack, ids in cfg.stacks.items():
        found = [np.asarray(s, np.float64) for s in by_matrix[stack].values()]
        total[list(ids)] = np.sum(found, axis=0)
    return total


@jax.jit
def _absolute_sums_by_matrix(*factors: Params) -> Params:
    def sums(*stacks: jax.Array) -> jax.Array:
        product = functools.reduce(jnp.multiply, (x.astype(jnp.float32) for x in stacks))
        return jnp.sum(jnp.abs(product), axis=tuple(range(1, product.ndim)))

    return jax.tree.map(sums, *factors)
