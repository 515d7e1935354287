"""EvoPress (arXiv 2410.14649), its depth pruning: evolution over sets of removed layers."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.progress import over
from e3jax.selectors.removal import Dense, against_dense, dense_passes
from e3jax.selectors.selection import Calibration, Selection, Task, without

Removed = tuple[int, ...]  # ascending


def evopress(
    calibration: Calibration,
    task: Task,
    *,
    initial: int = 64,
    offspring: int = 32,
    survivors: int = 2,
    few: int = 2048,
    many: int = 32768,
    budget: int | None = None,
) -> Selection:
    """(1 + lambda) evolution by KL(dense || masked); defaults are the paper's, or its code's.

    The parent is the best of `initial` random sets. In each of n (L - n) / 1.5 generations (n
    layers removed) `offspring` sets are made of it by one to three swaps of a kept and a removed
    layer, the fewer the likelier; all are scored on the first `few` tokens of the calibration
    windows, their `survivors` best and the parent on the first `many`, and the best is the next
    parent. The paper draws other windows in every generation: here, since they stay, no set is
    scored twice on the same ones.
    budget: tokens through masked models; a generation that might exceed it is not begun.
    """
    rng = np.random.default_rng(calibration.seed)
    free = [i for i in range(task.num_layers) if i not in task.protect | task.force]
    choose = task.remove - len(task.force)
    size = max(initial, offspring, survivors + 1)
    small, large = (_Stage(calibration, task, tokens, size) for tokens in (few, many))

    def draw() -> Removed:
        return tuple(sorted({*rng.permutation(free)[:choose].tolist(), *task.force}))

    def mutate(parent: Removed) -> Removed:
        gone = [i for i in free if i in parent]
        kept = [i for i in free if i not in parent]
        for _ in range(rng.integers(1, 4, 2).min()):
            i, j = rng.integers(len(gone)), rng.integers(len(kept))
            gone[i], kept[j] = kept[j], gone[i]
        return tuple(sorted({*gone, *task.force}))

    if budget is not None:
        initial = max(1, min(initial, budget // max(small.tokens, 1)))
    parent = small.ranked(draw() for _ in range(initial))[0]
    generations = int(choose * (len(free) - choose) / 1.5)
    most = offspring * small.tokens + (survivors + 1) * large.tokens  # of a generation
    for _ in over("generations", range(generations), generations):
        if budget is not None and small.spent + large.spent + most > budget:
            break
        children = [mutate(parent) for _ in range(offspring)]
        best = small.ranked(gone for gone in children if gone != parent)[:survivors]
        parent = large.ranked([parent, *best])[0]
    return without(
        task,
        parent,
        tokens=small.spent + large.spent,
        teacher_tokens=small.tokens + large.tokens,
    )


class _Stage:
    """Sets scored on the first `tokens` of the calibration windows, at most `size` at a time."""

    def __init__(self, calibration: Calibration, task: Task, tokens: int, size: int) -> None:
        self._calibration, self._task, self._size = calibration, task, size
        batches = first_windows(calibration.batches, tokens)
        self._passes = list(dense_passes(calibration, batches))
        self.tokens = sum(int(dense.real) for dense in self._passes)
        self._kl: dict[Removed, float] = {}  # summed over predictions

    @property
    def spent(self) -> int:
        """Tokens that masked models have processed."""
        return len(self._kl) * self.tokens

    def ranked(self, sets: Iterable[Removed]) -> list[Removed]:
        """The distinct ones of the sets, the least KL first; of equal ones the first."""
        sets = list(dict.fromkeys(sets))
        if new := [gone for gone in sets if gone not in self._kl]:
            self._kl.update(zip(new, self._score(new).tolist(), strict=True))
        return sorted(sets, key=self._kl.__getitem__)

    def _score(self, sets: Sequence[Removed]) -> np.ndarray:
        given = self._calibration
        ids = np.zeros((self._size, self._task.keep), np.int32)
        for row, gone in zip(ids, sets):
            row[:] = [i for i in range(self._task.num_layers) if i not in gone]
        found = [
            _divergences(
                given.params, dense, ids, np.int32(len(sets)), given.cfg, given.dtype, given.chunk
            )
            for dense in self._passes
        ]
        return np.sum([np.asarray(kl, np.float64) for kl in found], axis=0)[: len(sets)]


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "chunk"))
def _divergences(
    params: Params,
    dense: Dense,
    ids: jax.Array,
    count: jax.Array,
    cfg: ModelConfig,
    dtype: Any,
    chunk: int,
) -> jax.Array:
    """KL(dense || the layers ids[m]) summed over a batch, float32 [M]; 0 from `count` on.

    ids: int32 [M, K].
    """

    def score(m: jax.Array, kl: jax.Array) -> jax.Array:
        h = decoder.hidden(params, dense.batch, cfg, dtype=dtype, layer_ids=ids[m], remat="none")
        return kl.at[m].set(against_dense(params, h, dense, cfg, chunk)[1])

    return jax.lax.fori_loop(0, count, score, jnp.zeros(len(ids), jnp.float32))


def first_windows(batches: Sequence[Batch], tokens: int) -> Sequence[Batch]:
    """The first windows with room for `tokens`, rounded up: to rows that the devices can share
    within a batch, else to whole batches; all where there are fewer.

    Of room, not of real tokens: each process knows its own rows alone, and all have to agree.
    """
    shards = mesh.row_shards()
    here, time = batches[0].tokens.shape
    each = -(-tokens // (time * shards))  # windows a shard
    rows = each * len(mesh.rows_here(shards))
    if rows < here:
        return [jax.tree.map(lambda x: x[:rows], batches[0])]
    return batches[: -(-rows // here)]
