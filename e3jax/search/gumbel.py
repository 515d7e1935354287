"""Gumbel-TopK masks over layers: the exact sampler, its relaxations and its score function.

theta [L] are the layers' logits, B rows draw one mask each. K may be traced, so that a curriculum
compiles once. Protected layers (always kept) and forced ones (always removed) are left out of the
competition by masks, never by infinities in theta, and get no gradient. n below is the number of
kept layers among those that compete, c how many compete.
"""

import math
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Relaxation = Literal["threshold", "khot", "softmax"]

GUMBEL_STD = math.pi / math.sqrt(6)  # 1.28
OUT = -1e30  # finite stand-in for a layer out of the competition: no NaN in any gradient
LOSS_FLOOR = 1e-6  # nats a token, about what float32 resolves: less is as good as nothing


@flax.struct.dataclass
class Draw:
    """B exact samples of K layers without replacement."""

    keep: jax.Array  # bool [B, L]
    perturbed: jax.Array  # float32 [B, L], theta + Gumbel noise
    competes: jax.Array  # bool [L]
    slots: jax.Array  # int32, n

    @property
    def has_boundary(self) -> jax.Array:
        """bool: some competitor is kept and some is not; otherwise there is nothing to learn."""
        return (self.slots > 0) & (self.slots < jnp.sum(self.competes))

    @property
    def order(self) -> jax.Array:
        """Layers from the highest perturbed logit down, int32 [B, L]; those out come last."""
        return _order(self.perturbed, self.competes)


def _order(perturbed_bl: jax.Array, competes_l: jax.Array) -> jax.Array:
    return jnp.argsort(jnp.where(competes_l, -perturbed_bl, -OUT), axis=-1, stable=True)


def sample(
    key: jax.Array,
    theta_l: jax.Array,
    k: jax.Array | int,
    rows: int,
    protect_l: jax.Array,
    force_l: jax.Array,
) -> Draw:
    """Keeps the K largest of theta + Gumbel(0, 1): an exact sample without replacement.

    Kool, van Hoof, Welling 2019 (arXiv 1903.06059). Every row keeps exactly K layers, or all that
    are not forced out where K is more.
    """
    noise = jax.random.gumbel(key, (rows, theta_l.shape[0]), jnp.float32)
    perturbed = theta_l + noise
    protect, force = jnp.asarray(protect_l, bool), jnp.asarray(force_l, bool)
    competes = ~(protect | force)
    slots = jnp.clip(k - jnp.sum(protect), 0, jnp.sum(competes)).astype(jnp.int32)
    rank = jnp.argsort(_order(perturbed, competes), axis=-1)
    return Draw((competes & (rank < slots)) | protect, perturbed, competes, slots)


def straight_through(draw: Draw, tau: jax.Array | float, kind: Relaxation) -> jax.Array:
    """float32 [B, L]: exactly the 0/1 mask forward, the relaxation's derivative backward.

    The paper's estimator; the choice of relaxation is ours. `draw.perturbed` carries theta's
    gradient. Where every competitor is kept, or none, there is no boundary and the gradient is 0.
    """
    soft = {"threshold": threshold, "khot": khot, "softmax": softmax}[kind](draw, tau)
    soft = jnp.where(draw.competes & draw.has_boundary, soft, 0.0)
    # These brackets: (hard + soft) - soft is not exactly 1 in a fifth of float32 draws.
    return draw.keep.astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))


def threshold(draw: Draw, tau: jax.Array | float) -> jax.Array:
    """sigmoid((s - t) / tau), t midway between the n-th and the next largest competitor.

    The gradient flows through t as well: a shift of all logits changes neither the mask nor this,
    so the gradient sums to 0 over layers.
    """
    ranked = jnp.take_along_axis(draw.perturbed, draw.order, axis=-1)
    last = draw.perturbed.shape[-1] - 1
    at = jnp.clip(jnp.stack([draw.slots - 1, draw.slots]), 0, last)
    t = jnp.mean(jnp.take(ranked, at, axis=-1), axis=-1, keepdims=True)
    return jax.nn.sigmoid((draw.perturbed - t) / tau)


def khot(draw: Draw, tau: jax.Array | float) -> jax.Array:
    """Relaxed k-hot vector of Xie & Ermon 2019 (arXiv 1901.10517); sums to n over competitors.

    For n > c / 2 it is taken of the complement, 1 - khot(-s, c - n): otherwise its gradient leaves
    the boundary and its entries exceed 1.
    """
    count = jnp.sum(draw.competes)
    flip = 2 * draw.slots > count
    sign = jnp.where(flip, -1.0, 1.0)
    rounds = jnp.where(flip, count - draw.slots, draw.slots)
    start = jnp.where(draw.competes, sign * draw.perturbed, OUT)

    def round_(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        s, total = carry
        a = jax.nn.softmax(s / tau, axis=-1)
        live = number < rounds
        # Near 1 the difference 1 - a has no digits left, and a layer would be taken twice: sum the
        # others instead (at most one a is above a half).
        others = jnp.sum(jnp.where(a > 0.5, 0.0, a), axis=-1, keepdims=True)
        left = jnp.maximum(jnp.where(a > 0.5, others, 1.0 - a), jnp.finfo(jnp.float32).tiny)
        s = s + jnp.where(live, jnp.log(left), 0.0)
        return (s, total + jnp.where(live, a, 0.0)), None

    carry = (start, jnp.zeros_like(start))
    (_, total), _ = jax.lax.scan(round_, carry, jnp.arange(start.shape[-1]))
    return jnp.where(flip, 1.0 - total, total)


def softmax(draw: Draw, tau: jax.Array | float) -> jax.Array:
    """n softmax(s / tau): for the ablation only, its gradient collapses on the largest logit."""
    s = jnp.where(draw.competes, draw.perturbed, OUT)
    return draw.slots * jax.nn.softmax(s / tau, axis=-1)


def log_prob(theta_l: jax.Array, draw: Draw) -> jax.Array:
    """Plackett-Luce log-probability of each row's kept layers in the order drawn, float32 [B].

    Sum over the n kept of theta_i - logsumexp of theta over all that were not yet drawn.
    """
    theta = jnp.where(draw.competes, theta_l, OUT)
    rank = jnp.argsort(draw.order, axis=-1)
    # Compared pair by pair: the gradient of theta[order] would be a scatter, which adds in any
    # order on a GPU, and then the devices' copies of theta drift apart.
    not_before = rank[:, None, :] >= rank[:, :, None]
    rest = jax.nn.logsumexp(jnp.where(not_before, theta, OUT), axis=-1)
    return jnp.sum(jnp.where(draw.keep & draw.competes, theta - rest, 0.0), axis=-1)


def advantage(loss: jax.Array, weight: jax.Array) -> jax.Array:
    """Standardised log loss with a leave-one-out baseline, float32, from the sums of rows that are
    compared over the last axis: [B], or [W, M] of M masks for each of W windows.

    The baseline of a row is the mean log loss of the others, so it does not depend on the row's
    own mask and the estimate stays unbiased; (x_b - mean of the others) = B / (B - 1) (x_b - mean).
    The division by the standard deviation over all rows is a common positive factor, which fixes
    the gradient's size and not its direction. Rows without loss tokens, or whose loss is not
    finite, get 0 and count in nobody's baseline.
    """
    counted = (weight > 0) & jnp.isfinite(loss)
    rows = jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)
    mean_loss = jnp.where(counted, loss / jnp.where(counted, weight, 1.0), 1.0)
    log_loss = jnp.where(counted, jnp.log(jnp.maximum(mean_loss, LOSS_FLOOR)), 0.0)
    mean = jnp.sum(log_loss, axis=-1, keepdims=True) / rows
    centred = jnp.where(counted, log_loss - mean, 0.0)
    deviation = jnp.sqrt(jnp.sum(centred**2) / jnp.maximum(jnp.sum(counted), 1))
    return centred * rows / jnp.maximum(rows - 1, 1) / jnp.maximum(deviation, 1e-3)


def score_gradient(theta_l: jax.Array, draw: Draw, advantage_b: jax.Array) -> jax.Array:
    """Score-function gradient mean_b A_b grad log p_b, float32 [L]: needs forward passes only.

    This estimator is ours; the paper's is `straight_through`. Exactly 0 where nothing is at stake.
    """
    weights = jax.lax.stop_gradient(jnp.where(draw.has_boundary, advantage_b, 0.0))
    return jax.grad(lambda theta: jnp.mean(weights * log_prob(theta, draw)))(theta_l)


def curriculum(
    step: jax.Array | int, steps: int, share: float, num_layers: int, keep: int
) -> jax.Array:
    """K at a step, int32: from L - 1 down to `keep` over the first `share` of the steps."""
    progress = jnp.clip((step + 1) / max(share * steps, 1.0), 0.0, 1.0)
    # The small constant keeps float32 from rounding an exact count up.
    removed = jnp.ceil((num_layers - keep) * progress - 1e-4)
    return (num_layers - removed).astype(jnp.int32)


def temperature(step: jax.Array | int, steps: int, ends: tuple[float, float]) -> jax.Array:
    """tau at a step, float32: geometric from the first value to the last."""
    share = jnp.clip(step / max(steps - 1, 1), 0.0, 1.0)
    return ends[0] * (ends[1] / ends[0]) ** share


def answer(
    theta_l: np.ndarray, keep: int, protect_l: np.ndarray, force_l: np.ndarray
) -> np.ndarray:
    """TopK of the noiseless theta: bool [L], exactly `keep` layers; ties go to the lower layer."""
    theta = np.where(protect_l, np.inf, np.where(force_l, -np.inf, np.asarray(theta_l)))
    kept = np.zeros(len(theta), bool)
    kept[np.argsort(-theta, kind="stable")[:keep]] = True
    return kept


def keep_probability(
    key: jax.Array,
    theta_l: np.ndarray,
    keep: int,
    protect_l: np.ndarray,
    force_l: np.ndarray,
    samples: int,
) -> np.ndarray:
    """Share of `samples` masks that keep each layer, float32 [L]."""
    draw = sample(key, jnp.asarray(theta_l), keep, samples, protect_l, force_l)
    return np.asarray(jnp.mean(draw.keep.astype(jnp.float32), axis=0))


def mask_entropy(probability_l: np.ndarray) -> float:
    """Entropy of whether a layer is kept, mean over layers, bits: 0 once the mask is decided, at
    most 1. From the probability of each, as if they were independent."""
    p = np.clip(np.asarray(probability_l, np.float64), 1e-12, 1 - 1e-12)
    return float(np.mean(-p * np.log2(p) - (1 - p) * np.log2(1 - p)))


def init_theta(
    importance_l: np.ndarray,
    init: Literal["kl", "shortgpt", "zeros", "random"],
    form: Literal["log", "rank"],
    scale: float,
    seed: int,
) -> np.ndarray:
    """Where theta starts, float32 [L]: mean 0 and a spread of `scale` Gumbel standard deviations.

    kl, shortgpt: zscore of the log importance, or of its rank; raw importance spans three decades,
    which would start nearly all layers at the same place. Zero variance, or `zeros`: all 0.
    """
    if init == "zeros":
        return np.zeros(len(importance_l), np.float32)
    if init == "random":
        x = np.random.default_rng(seed).normal(size=len(importance_l))
    elif form == "rank":
        x = np.unique(importance_l, return_inverse=True)[1].astype(np.float64)
    else:
        x = np.log(np.maximum(importance_l, LOSS_FLOOR))
    if np.ptp(x) == 0:  # the standard deviation of equal numbers may round to above 0
        return np.zeros(len(importance_l), np.float32)
    return (scale * GUMBEL_STD * (x - np.mean(x)) / np.std(x)).astype(np.float32)
