"""Selectors that remove layers and see what becomes of the predictions.

Figures are means over the predictions that carry loss, in nats a token; layers are scored with all
others in place (one shot), or again after each removal (greedy).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
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
from e3jax.selectors.selection import Calibration, Selection, Task, lowest, without


@flax.struct.dataclass
class Dense:
    """A batch on the devices, and what the dense model makes of it."""

    batch: Batch
    h: jax.Array  # final hidden states [B, T, D], after the last norm
    real: jax.Array  # int32 scalar: tokens that are not padding, of all processes
    predictions: jax.Array  # int32 scalar: those of them that carry loss


def dense_passes(calibration: Calibration, batches: Iterable[Batch]) -> Iterator[Dense]:
    """The dense model's pass over each of the batches."""
    for batch in batches:
        batch = mesh.shard_batch(batch)
        yield _dense_pass(calibration.params, batch, calibration.cfg, calibration.dtype)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _dense_pass(params: Params, batch: Batch, cfg: ModelConfig, dtype: Any) -> Dense:
    h = decoder.hidden(params, batch, cfg, dtype=dtype, remat="none")
    return Dense(batch, h, jnp.sum(batch.segments > 0), jnp.sum(batch.mask))


def against_dense(
    params: Params, h: jax.Array, dense: Dense, cfg: ModelConfig, chunk: int
) -> jax.Array:
    """Sums over a batch's predictions, float32 [2], inside jit: next-token NLL and KL(dense || h).

    h: final hidden states [B, T, D] of a masked model, after the last norm.
    """
    w, batch = decoder.head(params, cfg), dense.batch
    teacher, objective = losses.Online(dense.h, w), losses.Objective(chunk=chunk)
    _, sums = losses.token_sums(h, w, batch.targets, batch.mask, teacher, objective)
    return jnp.stack([jnp.sum(sums.nll), jnp.sum(sums.kl)])


class Removals(NamedTuple):
    """What each layer's removal does: float64 [L], nats a token, nan where it was not asked for."""

    nll: np.ndarray  # of the next token
    kl: np.ndarray  # KL(dense || without the layer)
    tokens: int  # processed by masked models
    data: int  # real tokens of the batches


def removals(
    calibration: Calibration,
    passes: Iterable[Dense],
    alive: Sequence[int],
    candidates: Sequence[int],
) -> Removals:
    """Scores the model of layers `alive` without each of the `candidates`, which are some of them.

    Both ascending. A candidate's model starts from the residual stream that the layers below it
    leave, computed once for all: half of the work.
    """
    layers = calibration.cfg.num_layers
    places = [alive.index(layer) for layer in candidates]
    alive_l, place_l = (_padded(ids, layers) for ids in (alive, places))
    sums, predictions, data = np.zeros((layers, 2)), 0, 0
    for dense in passes:
        found = _removals(
            calibration.params,
            dense,
            (alive_l, np.int32(len(alive))),
            (place_l, np.int32(len(places))),
            calibration.cfg,
            calibration.dtype,
            calibration.chunk,
        )
        sums += np.asarray(found, np.float64)
        predictions, data = predictions + int(dense.predictions), data + int(dense.real)
    nll, kl = sums.T / max(predictions, 1)
    return Removals(nll, kl, len(candidates) * data, data)


def _padded(ids: Sequence[int], size: int) -> np.ndarray:
    return np.array([*ids, *[0] * (size - len(ids))], np.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "chunk"))
def _removals(
    params: Params,
    dense: Dense,
    alive: tuple[jax.Array, jax.Array],
    places: tuple[jax.Array, jax.Array],
    cfg: ModelConfig,
    dtype: Any,
    chunk: int,
) -> jax.Array:
    """`against_dense` without each candidate, float32 [L, 2].

    alive: layer ids, padded, and their count; places: which of them are candidates, likewise. So
    the program is one for all rounds.
    """
    apply = decoder.by_number(params, cfg, decoder.applier(dense.batch, cfg, dtype))
    (alive_l, alive_count), (place_l, place_count) = alive, places

    def run(place: jax.Array, h: jax.Array) -> jax.Array:
        return apply(alive_l[place], h)

    def score(number: jax.Array, state: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        below, start, sums = state
        place = place_l[number]
        below = jax.lax.fori_loop(start, place, run, below)
        h = jax.lax.fori_loop(place + 1, alive_count, run, below)
        h = decoder.last_norm(params, h, cfg)
        found = against_dense(params, h, dense, cfg, chunk)
        return below, place, sums.at[alive_l[place]].set(found)

    h = decoder.first_stream(params, dense.batch.tokens, cfg, dtype)
    state = (h, jnp.int32(0), jnp.full((cfg.num_layers, 2), jnp.nan, jnp.float32))
    return jax.lax.fori_loop(0, place_count, score, state)[2]


# ---------------------------------------------------------------- one shot


def _leave_one_out(calibration: Calibration) -> Removals:
    layers, batches = range(calibration.cfg.num_layers), calibration.batches
    passes = over("batches measured", dense_passes(calibration, batches), len(batches))
    return removals(calibration, passes, layers, layers)


def leave_one_out_kl(calibration: Calibration) -> tuple[np.ndarray, int]:
    """KL(dense || without layer l), nats a token, float64 [L]: E3-Pruner's start (EvoPress's `kl`).

    Returns the scores and the tokens processed by masked models: L times the data.
    """
    found = _leave_one_out(calibration)
    return found.kl, found.tokens


def ppl(calibration: Calibration, task: Task) -> Selection:
    """Shortened LLaMA (arXiv 2402.02834): those go without which perplexity is least, one shot.

    Scores: next-token NLL without the layer, nats a token; perplexity is its exponential.
    """
    found = _leave_one_out(calibration)
    return lowest(task, found.nll, tokens=found.tokens, teacher_tokens=found.data)


def kl(calibration: Calibration, task: Task) -> Selection:
    """EvoPress's start (arXiv 2410.14649), and E3-Pruner's: those go without which the predictions
    change least, one shot. Scores: KL(dense || without the layer), nats a token."""
    found = _leave_one_out(calibration)
    return lowest(task, found.kl, tokens=found.tokens, teacher_tokens=found.data)


# ---------------------------------------------------------------- greedy


def sleb(calibration: Calibration, task: Task) -> Selection:
    """SLEB (arXiv 2402.09025): again and again the layer goes without which next-token NLL is
    least, but never the first or the last of those left.

    Scores: of the first round, nats a token; nan for layers that were not to choose from.
    Raises UserError where no layer is.
    """
    return _greedy(calibration, task, "nll", ends=False)


def greedy_kl(calibration: Calibration, task: Task) -> Selection:
    """As `sleb`, by KL(dense || without the layer), and any layer may go."""
    return _greedy(calibration, task, "kl", ends=True)


def _greedy(calibration: Calibration, task: Task, by: str, ends: bool) -> Selection:
    alive = [i for i in range(task.num_layers) if i not in task.force]
    order, scores, tokens = sorted(task.force), (), 0
    # Kept: as much as a layer's activations for the data, for one more pass in every round.
    passes = list(dense_passes(calibration, calibration.batches))
    rounds = task.remove - len(order)
    for _ in over("layers removed", range(rounds), rounds):
        fixed = task.protect if ends else task.protect | {alive[0], alive[-1]}
        candidates = [i for i in alive if i not in fixed]
        if not candidates:
            raise UserError(
                f"search.keep={task.keep}: of the layers left, {alive}, none may be removed"
            )
        found = removals(calibration, passes, alive, candidates)
        score = getattr(found, by)
        scores, tokens = scores or tuple(score.tolist()), tokens + found.tokens
        order.append(int(np.nanargmin(score)))
        alive.remove(order[-1])
    teacher_tokens = sum(int(dense.real) for dense in passes)
    return without(task, order, scores=scores, tokens=tokens, teacher_tokens=teacher_tokens)
