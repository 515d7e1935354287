"""Selectors by how little layers turn the residual stream: h_0 the embeddings, h_l what layer l - 1
gives, before the final norm unless said otherwise.

Averages run over real (not padding) tokens; each token's figure is float32, sums and counts are
divided once, in float64. Each selector costs one pass of the dense model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.errors import UserError
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.progress import over
from e3jax.selectors import selection
from e3jax.selectors.selection import Calibration, Selection, Task

Sums = tuple[jax.Array, jax.Array]  # what is averaged, added up, float32 [...]; of how many, int32


def block_influence(calibration: Calibration, *, final_norm: bool = False) -> np.ndarray:
    """ShortGPT (arXiv 2403.03853): BI_l = 1 - E[cos(h_l, h_{l+1})], float64 [L].

    final_norm: h_L is taken after the final norm, as Hugging Face's hidden_states[-1] is, which the
    released code of several scorers reads.
    """
    return 1.0 - _mean(_measure(calibration, _layer_cosines, final_norm=final_norm))


def shortgpt(calibration: Calibration, task: Task) -> Selection:
    """The layers of least block influence (arXiv 2403.03853). scores: BI, of each layer."""
    scores = block_influence(calibration)
    return selection.lowest(task, scores, teacher_tokens=calibration.tokens)


def shortgpt_released(calibration: Calibration, task: Task) -> Selection:
    """`shortgpt` as its code has it: the last layer's output is taken after the final norm."""
    scores = block_influence(calibration, final_norm=True)
    return selection.lowest(task, scores, teacher_tokens=calibration.tokens)


def minitron(calibration: Calibration, task: Task) -> Selection:
    """Minitron (arXiv 2408.11796): block influence of each batch, added up over the batches, so a
    token of a batch with few of them counts for more. scores: that sum, of each layer."""
    batches = _measure(calibration, _layer_cosines, final_norm=False)
    scores = np.sum([1.0 - cosines / count for cosines, count in batches if count], axis=0)
    return selection.lowest(task, scores, teacher_tokens=calibration.tokens)


def streamline(calibration: Calibration, task: Task) -> Selection:
    """LLM-Streamline (arXiv 2403.19135): the n layers in a row from argmax_l E[cos(h_l, h_{l+n})].

    scores: that mean, of each start l = 0..L-n.
    """
    return _best_block(calibration, task, "streamline", max, compare=cosine, chosen=_real)


def angular(calibration: Calibration, task: Task) -> Selection:
    """Gromov et al. (arXiv 2403.17887): the n layers in a row from l on whose angular distance
    arccos(cos(h_l, h_{l+n})) / pi is least, in the mean over the last tokens of the documents.

    scores: that mean, of each start l = 0..L-n.
    """
    options = {"compare": _angle, "chosen": _last_of_document}
    return _best_block(calibration, task, "angular", min, **options)


def angular_released(calibration: Calibration, task: Task) -> Selection:
    """`angular` as PruneMe has it: h_L is taken after the final norm, and h_0 is not looked at, so
    that layer 0 stays."""
    task = dataclasses.replace(task, protect=task.protect | {0})
    options = {"compare": _angle, "chosen": _last_of_document, "final_norm": True}
    return _best_block(calibration, task, "angular_released", min, **options)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of [..., D] and [..., D], float32 [...]."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    dot, xx, yy = jnp.sum(x * y, -1), jnp.sum(x * x, -1), jnp.sum(y * y, -1)
    return dot * jax.lax.rsqrt(xx * yy + 1e-20)


def _angle(x: jax.Array, y: jax.Array) -> jax.Array:
    """Between 0 (the same direction) and 1 (opposite ones)."""
    return jnp.arccos(jnp.clip(cosine(x, y), -1.0, 1.0)) / math.pi


def _real(batch: Batch) -> jax.Array:
    return batch.segments > 0


def _last_of_document(batch: Batch) -> jax.Array:
    following = jnp.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
    return _real(batch) & (batch.segments != following)


def _best_block(
    calibration: Calibration,
    task: Task,
    selector: str,
    best: Callable[..., int],  # min or max: of equal ones the first
    **options: Any,
) -> Selection:
    starts = _allowed_starts(task, selector)
    mean_s = _mean(_measure(calibration, _across_blocks, n=task.remove, **options))
    start = best(starts, key=lambda s: mean_s[s])
    scores = tuple(map(float, mean_s))
    return selection.block(task, start, selector, scores=scores, teacher_tokens=calibration.tokens)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "final_norm"))
def _layer_cosines(
    params: Params, batch: Batch, *, cfg: ModelConfig, dtype: Any, final_norm: bool
) -> Sums:
    """cos(h_l, h_{l+1}) over the real tokens [L]."""
    real = _real(batch)

    def observe(h: jax.Array, y: jax.Array) -> jax.Array:
        """Of the layer, and were it the last one with its output after the final norm."""
        outputs = (y, decoder.last_norm(params, y, cfg))
        return jnp.stack([_sum(cosine(h, x), real) for x in outputs])

    _, cosine_l2 = decoder.hidden(params, batch, cfg, dtype=dtype, remat="none", observe=observe)
    cosine_l = cosine_l2[:, 0]
    if final_norm:
        cosine_l = jnp.append(cosine_l[:-1], cosine_l2[-1, 1])
    return cosine_l, jnp.sum(real)


@functools.partial(
    jax.jit, static_argnames=("cfg", "dtype", "n", "compare", "chosen", "final_norm")
)
def _across_blocks(
    params: Params,
    batch: Batch,
    *,
    cfg: ModelConfig,
    dtype: Any,
    n: int,
    compare: Callable[[jax.Array, jax.Array], jax.Array],
    chosen: Callable[[Batch], jax.Array],
    final_norm: bool = False,
) -> Sums:
    """compare(h_l, h_{l+n}) over the chosen tokens, of each start l = 0..L-n.

    The batch's h_0..h_L are held at once, in `dtype`.
    """
    here = chosen(batch)
    last, out_lbtd = decoder.hidden(
        params, batch, cfg, dtype=dtype, remat="none", observe=lambda _, y: y
    )
    if final_norm:
        out_lbtd = out_lbtd.at[-1].set(last)
    first = compare(decoder.first_stream(params, batch.tokens, cfg, dtype), out_lbtd[n - 1])
    others = jax.lax.map(
        lambda layer: _sum(compare(out_lbtd[layer], out_lbtd[layer + n]), here),
        jnp.arange(cfg.num_layers - n),
    )
    return jnp.append(_sum(first, here), others), jnp.sum(here)


def _sum(x: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, x, 0.0))


def _measure(
    calibration: Calibration, sums: Callable[..., Sums], **options: Any
) -> Iterator[tuple[np.ndarray, int]]:
    """Of each batch: the sums, and the number of tokens that they are of."""
    options = {"cfg": calibration.cfg, "dtype": calibration.dtype, **options}
    for batch in over("batches measured", calibration.batches, len(calibration.batches)):
        total, count = sums(calibration.params, mesh.shard_batch(batch), **options)
        yield np.asarray(total, np.float64), int(count)


def _mean(batches: Iterator[tuple[np.ndarray, int]]) -> np.ndarray:
    total, count = functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), batches)
    return total / max(count, 1)


def _allowed_starts(task: Task, selector: str) -> list[int]:
    """Where `remove` layers in a row may start. Raises UserError where they may nowhere."""
    blocks = [set(range(s, s + task.remove)) for s in range(task.keep + 1)]
    starts = [s for s, gone in enumerate(blocks) if task.force <= gone and not task.protect & gone]
    if not starts:
        raise UserError(
            f"{selector} removes {task.remove} layers in a row, and no such block has all layers "
            f"that search.force names ({sorted(task.force)}) and none that are to stay "
            f"({sorted(task.protect)}): force and protect fewer"
        )
    return starts
