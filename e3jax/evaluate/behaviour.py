"""What pruning does to a model's behaviour, token by token.

An average hides it: the KL sits in the few tokens where the dense model itself is unsure
(arXiv 2407.09141).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from e3jax import mesh, notice, processes
from e3jax.distill import losses
from e3jax.evaluate.figures import Figures
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.progress import over


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A model beside the dense one at every token that carries loss: float64 [N] each."""

    kl: np.ndarray  # KL(dense || model), nats
    nll: np.ndarray  # of the target, nats
    entropy: np.ndarray  # of the dense model, nats
    agree: np.ndarray  # 1 where both have the same most likely token
    window: np.ndarray  # int64, ascending

    def figures(self) -> Figures:
        """Their averages."""
        if not len(self.kl):
            return Figures(perplexity=1.0, kl=0.0, agreement=0.0, tokens=0)
        return Figures(
            perplexity=math.exp(min(self.nll.mean(), 700.0)),
            kl=float(self.kl.mean()),
            agreement=float(self.agree.mean()),
            tokens=len(self.kl),
        )

    def windows(self) -> list[tuple[float, int]]:
        """KL, a sum, and tokens of each window that has any."""
        count = np.bincount(self.window)
        kl = np.bincount(self.window, self.kl)
        return [(float(kl[i]), int(count[i])) for i in np.flatnonzero(count)]


def make_tokens(
    cfg: ModelConfig, student_cfg: ModelConfig, *, dtype: Any, chunk: int
) -> Callable[[Params, Params, Iterable[Batch]], Tokens]:
    """(dense params, student params, numpy batches) -> Tokens, the same on every process."""

    @jax.jit
    def compare(dense: Params, student: Params, batch: Batch) -> losses.Compared:
        h_p = decoder.hidden(dense, batch, cfg, dtype=dtype, remat="none")
        h_q = decoder.hidden(student, batch, student_cfg, dtype=dtype, remat="none")
        heads = decoder.head(student, student_cfg), decoder.head(dense, cfg)
        return losses.each_token(h_q, heads[0], h_p, heads[1], batch.targets, chunk)

    def tokens(dense: Params, student: Params, batches: Iterable[Batch]) -> Tokens:
        parts, first = [], 0
        for batch in over("batches measured", notice.interruptible(batches)):
            rows = mesh.shard_batch(batch)
            found = compare(dense, student, rows)
            mask = processes.whole(rows.mask)
            window = first + np.nonzero(mask)[0]
            parts.append([*(processes.whole(x)[mask].astype(np.float64) for x in found), window])
            first += len(mask)
        kl, nll, entropy, agree, window = map(np.concatenate, zip(*parts, strict=True))
        return Tokens(kl=kl, nll=nll, entropy=entropy, agree=agree, window=window)

    return tokens


@dataclasses.dataclass(frozen=True)
class Decile:
    """A tenth of the tokens, by the dense model's entropy."""

    entropy: float  # the greatest, nats
    tokens: int
    kl: float  # average, nats
    agreement: float


def deciles(found: Tokens) -> list[Decile]:
    """From the tokens that the dense model is surest of to those it is least sure of. Ties stay in
    their order, so that all tenths are of the same size but for one token."""
    order = np.argsort(found.entropy, kind="stable")
    return [
        Decile(
            entropy=float(found.entropy[part].max()),
            tokens=len(part),
            kl=float(found.kl[part].mean()),
            agreement=float(found.agree[part].mean()),
        )
        for part in np.array_split(order, 10)
        if len(part)
    ]
