"""How fast a model answers here: a short measurement of what pruning is for."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from e3jax import job, mesh
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import Arrival, make_generator

PROMPT, NEW = 128, 32  # tokens a row, or what the context has room for
ROWS = 8
TIMES = 5  # measured; the fastest counts: what else a machine does only slows


@dataclasses.dataclass(frozen=True)
class Pace:
    """Tokens a second, of ROWS rows together."""

    prefill: float  # of prompts read
    decode: float  # of answers, greedily


def measure(params: Params, cfg: ModelConfig, *, dtype: Any) -> Pace:
    """Times the generator on random prompts of one length, after a first round that compiles."""
    rows = job.rows_per_batch(ROWS)
    new = min(NEW, cfg.max_position // 2)
    prompt = min(PROMPT, cfg.max_position - new)
    generator = make_generator(cfg, dtype=dtype, eos=())
    weights = generator.prepare(params)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, prompt), np.int32)
    numbers = np.arange(rows, dtype=np.int32)
    arrival = Arrival(tokens, np.ones_like(tokens), numbers, np.full_like(numbers, new), None)
    arrival, alive = mesh.share_batch((arrival, np.ones(rows, bool)))
    seconds = []
    for _ in range(1 + TIMES):
        slots = generator.empty(weights, rows=rows, columns=prompt + new, sampled=False)
        at = [_now(slots)]
        slots = generator.admit(weights, slots, arrival)
        at.append(_now(slots))
        slots, said = generator.go_on(weights, slots, alive, np.int32(rows), np.int32(new))
        at.append(_now(said))
        seconds.append(np.diff(at))
    prefill, decode = (min(part) for part in zip(*seconds[1:], strict=True))
    return Pace(prefill=rows * prompt / prefill, decode=rows * new / decode)


def _now(arrays: Any) -> float:
    """The time when these are there."""
    jax.block_until_ready(arrays)
    return time.perf_counter()
