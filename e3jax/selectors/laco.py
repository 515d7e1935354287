"""LaCo (arXiv 2402.11187): rear layers collapse into the layer before them.

A merge adds the differences of the m layers that follow layer l to its weights:
theta*_l = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l). From the top of the model downwards, a
merge stays where the final hidden states remain like those of the dense model.

`theta` is all of attention and mlp. The norms before the two stay those of layer l, as in the
authors' code. That code also overwrites where the paper adds up, so that theta*_l = theta_{l+m},
and does not go back up to where a whole merge fits below the last layer: the `released` variant.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.errors import UserError
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.selectors.selection import Calibration, Selection, Task, check_fixed

Merge = tuple[int, tuple[int, ...]]  # a layer, and those whose differences to it are added
Similarity = Callable[[tuple[Merge, ...], tuple[int, ...]], float]  # of (merges, layers left)

SIZE = 4  # layers that become one
INTERVAL = 2
# Tried from the first for a given number of layers. Every merge is accepted at the last.
THRESHOLDS = (*(round(0.95 - 0.05 * i, 2) for i in range(20)), -1.0)


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a norm beside attention and mlp, which stays layer l's."""
    return name.removesuffix("_bias") in ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm")


def laco(calibration: Calibration, task: Task) -> Selection:
    """LaCo at the highest of THRESHOLDS that removes `task.remove` layers, and no more than those:
    the last merge takes fewer where it would take too many.

    Protected layers are neither merged away nor changed. `scores` has the mean cosine at each
    accepted merge. Raises UserError where merging cannot do what the task says.
    """
    return _of_task(calibration, task, "laco", released=False)


def laco_released(calibration: Calibration, task: Task) -> Selection:
    """`laco` as the authors' code computes it: a layer takes the weights of the last one merged."""
    return _of_task(calibration, task, "laco_released", released=True)


def sweep(
    calibration: Calibration,
    threshold: float,
    *,
    size: int = SIZE,
    lowest: int = 0,
    highest: int | None = None,
    interval: int = INTERVAL,
    released: bool = False,
) -> Selection:
    """LaCo as published: as many layers go as merges have a mean cosine above `threshold`.

    In the paper's letters `size` is C, `lowest` L, `highest` H and `interval` I. Places are from 0
    and among the layers left. The first trial merges places H - C to H - 1, the last is into L or
    above; an accepted merge is followed by one I places lower. By default H is the last layer.
    """
    layers = calibration.cfg.num_layers
    find = functools.partial(
        _sweep,
        num_layers=layers,
        threshold=threshold,
        size=size,
        lowest=lowest,
        highest=layers - 1 if highest is None else highest,
        interval=interval,
        released=released,
        protect=frozenset(),
        most=layers,
        stacks=tuple(calibration.cfg.stacks.values()),
    )
    return _counted(calibration, find)


def survivors(
    params: Params, cfg: ModelConfig, keep: Sequence[int], merges: Sequence[Merge]
) -> Params:
    """The layers `keep` of a dense model, with what is merged into them."""
    whole = merge(params, cfg, merges) if merges else params
    return decoder.take_layers(whole, cfg, keep)


def merge(params: Params, cfg: ModelConfig, merges: Iterable[Merge]) -> Params:
    """The dense model's parameters with `merges` done: still all layers, of which
    `decoder.take_layers` takes those that stay.

    merges: as in Selection, in order: a later one finds the weights that earlier ones made. Each is
      of layers that are alike, summed in float32 and rounded to the dtype of the parameters.
    """
    stacks = {name: jax.tree.map(jnp.copy, params[name]) for name in cfg.stacks}  # see _collapse
    for into, merged in merges:
        name, ids = next((name, ids) for name, ids in cfg.stacks.items() if into in ids)
        places = tuple(ids.index(i) for i in merged)
        stacks[name] = _collapse(stacks[name], ids.index(into), places)
    return params | stacks


@functools.partial(jax.jit, donate_argnums=0)
def _collapse(layers: Params, into: int, merged: tuple[int, ...]) -> Params:
    """One merge, by places in the stack, in its memory."""

    def changed(stack: jax.Array) -> jax.Array:
        # theta_l collected: so one merged layer replaces it to the bit.
        total = sum(stack[i].astype(jnp.float32) for i in merged)
        total -= (len(merged) - 1) * stack[into].astype(jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(stack, total.astype(stack.dtype), into, 0)

    return {name: w if is_norm(name) else changed(w) for name, w in layers.items()}


def _of_task(calibration: Calibration, task: Task, name: str, released: bool) -> Selection:
    stacks = tuple(calibration.cfg.stacks.values())

    def find(similarity: Similarity) -> Selection:
        reached = 0
        for threshold in THRESHOLDS:
            found = _sweep(
                similarity,
                num_layers=task.num_layers,
                threshold=threshold,
                size=min(SIZE, task.remove + 1),
                lowest=0,
                highest=task.num_layers - 1,
                interval=INTERVAL,
                released=released,
                protect=task.protect,
                most=task.remove,
                stacks=stacks,
            )
            if len(found.order) == task.remove:
                check_fixed(task, found.order, name)
                return found
            reached = max(reached, len(found.order))
        raise UserError(
            f"{name} can merge {reached} of {task.num_layers} layers away, and {task.remove} are "
            f"to go; keep more layers, protect fewer, or take another selector"
        )

    return _counted(calibration, find)


def _sweep(
    similarity: Similarity,
    *,
    num_layers: int,
    threshold: float,
    size: int,
    lowest: int,
    highest: int,
    interval: int,
    released: bool,
    protect: frozenset[int],
    most: int,
    stacks: Sequence[Sequence[int]],
) -> Selection:
    """Algorithm 1 of the paper, until `most` layers are gone. Only layers of one of the `stacks`,
    which are alike, merge."""
    layers = tuple(range(num_layers))
    order, scores, merges = (), (), ()
    place = highest - size
    while place >= lowest and len(order) < most:
        free = itertools.takewhile(lambda i: i not in protect, layers[place : place + size])
        into = next(free, None)
        alike = next((ids for ids in stacks if into in ids), ())
        gone = tuple(itertools.takewhile(lambda i: i in alike, free))[: most - len(order)]  # noqa: B023
        place -= 1
        if into is None or not gone:
            continue
        trial = (*merges, (into, gone[-1:] if released else gone))
        left = tuple(i for i in layers if i not in gone)
        cosine = similarity(trial, left)
        if cosine > threshold:
            layers, merges, order, scores = left, trial, (*order, *gone), (*scores, cosine)
            place -= interval - 1
            if not released:  # so that the next one is whole, and the last layer is none of it
                place = min(place, len(layers) - 1 - size)
    return Selection(layers, order, scores, merges=merges)


def _counted(calibration: Calibration, find: Callable[[Similarity], Selection]) -> Selection:
    """What `find` selects by the similarity of collapsed models, with the tokens that they and the
    dense model processed. In memory are the dense model with its final states, [B, T, D] a batch,
    and one collapsed model: a copy of the stack costs little beside running it."""
    params, cfg, dtype = calibration.params, calibration.cfg, calibration.dtype
    batches = [mesh.shard_batch(batch) for batch in calibration.batches]

    def states(params: Params, batch: Batch, layers: tuple[int, ...]) -> jax.Array:
        ids = np.zeros(cfg.num_layers, np.int32)
        ids[: len(layers)] = layers
        return _final(params, batch, ids, len(layers), cfg, dtype)

    dense = [states(params, batch, tuple(range(cfg.num_layers))) for batch in batches]

    @functools.cache  # thresholds share the trials until their first difference
    def similarity(merges: tuple[Merge, ...], layers: tuple[int, ...]) -> float:
        collapsed = merge(params, cfg, merges)
        sums = [
            _cosines(states(collapsed, batch, layers), h, batch.segments)
            for batch, h in zip(batches, dense, strict=True)
        ]
        total, documents = np.sum(np.asarray(sums, np.float64), axis=0)
        return float(total / max(documents, 1.0))

    found = find(similarity)
    return dataclasses.replace(
        found,
        tokens=calibration.tokens * similarity.cache_info().misses,
        teacher_tokens=calibration.tokens,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _final(
    params: Params, batch: Batch, ids: jax.Array, count: int, cfg: ModelConfig, dtype: Any
) -> jax.Array:
    """Hidden states [B, T, D] after the last norm of the model of layers ids[:count], int32 [L].
    One program for any number of layers."""
    apply = decoder.by_number(params, cfg, decoder.applier(batch, cfg, dtype))

    def step(i: jax.Array, h: jax.Array) -> jax.Array:
        return apply(ids[i], h)

    h = jax.lax.fori_loop(0, count, step, decoder.first_stream(params, batch.tokens, cfg, dtype))
    return decoder.last_norm(params, h, cfg)


@jax.jit
def _cosines(x_btd: jax.Array, y_btd: jax.Array, segments_bt: jax.Array) -> jax.Array:
    """float32 [2]: the cosines of documents summed, and their number. A document's states are one
    vector, of all its tokens, as in the authors' code."""
    x, y = x_btd.astype(jnp.float32), y_btd.astype(jnp.float32)
    member_btn = segments_bt[:, :, None] == 1 + jnp.arange(segments_bt.shape[1])

    def of_documents(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(member_btn, jnp.sum(a * b, -1)[:, :, None], 0.0), axis=1)

    norms = jnp.sqrt(of_documents(x, x) * of_documents(y, y))
    cosine_bn = of_documents(x, y) / jnp.where(norms == 0.0, 1.0, norms)
    return jnp.stack([jnp.sum(cosine_bn), jnp.sum(jnp.any(member_btn, axis=1), dtype=jnp.float32)])
