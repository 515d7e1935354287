"""How likely a model finds given texts: rows of any length, the longest first, in few programs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from e3jax import mesh, notice, processes
from e3jax.distill import losses, terms
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.models.serve import padded_width
from e3jax.progress import over

Scored = tuple[Sequence[int], int]  # tokens, and how many of them, the last ones, are asked about


def make_likelihood(
    cfg: ModelConfig, *, dtype: Any, chunk: int
) -> Callable[[Params, Sequence[Scored], int], list[tuple[float, bool]]]:
    """(params, rows, batch) -> of each row, in order, the log-probability in nats of its last
    tokens given those before, and whether each of them is the most likely one there.

    Rows have at least one token before those; batch: rows at a time, a multiple of the devices that
    share them. Sums are in float32. chunk: tokens of a device whose logits exist.
    """

    @jax.jit
    def sums(params: Params, batch: Batch) -> losses.Sums:
        h = decoder.hidden(params, batch, cfg, dtype=dtype, remat="none")
        head, objective = decoder.head(params, cfg), terms.Objective(chunk=chunk)
        return losses.token_sums(h, head, batch.targets, batch.mask, None, objective)[1]

    def likelihood(params: Params, rows: Sequence[Scored], batch: int) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        parts = [order[i : i + batch] for i in range(0, len(order), batch)]
        for part in over("batches scored", notice.interruptible(parts)):
            filled = [rows[i] for i in [*part, *part[:1] * (batch - len(part))]]
            of = sums(params, mesh.share_batch(_batch(filled)))
            nll, agree, count = map(processes.whole, (of.nll, of.agree, of.tokens))
            for row, i in enumerate(part):
                found[i] = -float(nll[row]), bool(agree[row] == count[row])
        return [found[i] for i in range(len(rows))]

    return likelihood


def _batch(rows: Sequence[Scored]) -> Batch:
    """numpy arrays; rows begin at the left."""
    width = padded_width(max(len(tokens) for tokens, _ in rows) - 1)
    tokens, targets, segments = np.zeros((3, len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for row, (ids, asked) in enumerate(rows):
        end = len(ids) - 1
        tokens[row, :end], targets[row, :end], segments[row, :end] = ids[:-1], ids[1:], 1
        mask[row, end - asked : end] = True
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    return Batch(tokens, positions, segments, targets, mask, documents=2)
