"""What a token's loss is, from the logits of teacher and student, and what is counted beside it.

p is the teacher (dense model), q the student. All float32.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, devices, mesh
from e3jax.models.head import Head

SAMPLE = 1024  # outcomes whose greatest logit stands for the greatest of all
NEAR = 60.0  # nats above it at which sums of e^z are far from float32's end, e^88


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a token's loss is; fields as in config.Distill."""

    divergence: Literal["forward_kl", "reverse_kl", "skew_kl"] = "forward_kl"
    skew: float = 0.1
    temperature: float = 1.0
    ce: float = 0.0
    tail: Literal["renormalise", "drop", "bucket"] = "bucket"
    weight: Literal["teacher", "student", "joint", "uniform"] = "uniform"
    weight_clip: tuple[float, float] = (0.2, 5.0)
    weight_power: float = 1.0
    chunk: int = 2048

    @classmethod
    def of(cls, recipe: config.Distill) -> "Objective":
        """The objective a configuration asks for."""
        return cls(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(cls)})


@flax.struct.dataclass
class Online:
    """A teacher in the step: its final hidden states [B, T, D] and head [V, D]."""

    h: jax.Array
    head: Head | jax.Array


@flax.struct.dataclass
class TopK:
    """A stored teacher: its k most likely tokens at the distillation temperature."""

    ids: jax.Array  # int32 [B, T, k]
    logp: jax.Array  # [B, T, k], full-vocabulary log-probabilities, read as float32
    entropy: jax.Array  # float32 [B, T], of the full vocabulary, nats


@flax.struct.dataclass
class Sums:
    """Sums over the masked tokens of each row, float32 [B]."""

    loss: jax.Array  # sum of w * loss; its total, apart from these, is what is differentiated
    weight: jax.Array  # sum of w: what it is divided by
    tokens: jax.Array
    nll: jax.Array  # next-token cross-entropy, nats
    kl: jax.Array  # KL(p || q) at temperature 1 (stored teacher: of its k + 1 outcomes, at its own)
    agree: jax.Array  # tokens where p and q have the same most likely token
    entropy: jax.Array  # of p, nats
    captured: jax.Array  # mass of p in the outcomes seen: 1 a token, less with a stored teacher


def entropy(logp: jax.Array) -> jax.Array:
    """Entropy in nats over the last axis of log-probabilities; impossible outcomes count 0."""
    return -jnp.sum(jnp.exp(logp) * jnp.maximum(logp, jnp.finfo(jnp.float32).min), axis=-1)


def divergence(logp: jax.Array, logq: jax.Array, objective: Objective) -> jax.Array:
    """Divergence of distributions given as log-probabilities over the last axis, nats.

    forward_kl: KL(p || q); reverse_kl: KL(q || p); skew_kl: KL(p || lambda p + (1 - lambda) q),
    DistiLLM (arXiv 2402.03898).
    """
    if objective.divergence == "reverse_kl":
        logp, logq = logq, logp
    elif objective.divergence == "skew_kl":
        skew = objective.skew
        logq = jnp.logaddexp(logp + math.log(skew), logq + math.log1p(-skew))
    return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)


def token_weight(
    h_p: jax.Array, h_q: jax.Array, mean_entropy: jax.Array | float, vocab: int, o: Objective
) -> jax.Array:
    """Weight of each token from the entropies of teacher and student (nats), detached.

    w = clip((H / mean H) ** power): tokens where the teacher is unsure count more. `joint` is
    EA-KD's H = (H_p + H_p H_q / log V) / 2. `uniform` is 1.
    """
    if o.weight == "uniform":
        return jnp.ones_like(h_p)
    h = {"teacher": h_p, "student": h_q, "joint": (h_p + h_p * h_q / math.log(vocab)) / 2}[o.weight]
    ratio = jax.lax.stop_gradient(h) / jnp.maximum(mean_entropy, 1e-6)
    return jnp.clip(jnp.maximum(ratio, 1e-12) ** o.weight_power, *o.weight_clip)


def at_ids(x_btv: jax.Array, ids_btk: jax.Array) -> jax.Array:
    """x at given places of the vocabulary axis, [B, T, k]; that axis may be sharded."""
    sharded = mesh.current() is not None and jax.typeof(x_btv).sharding.spec[-1] is not None
    if not sharded:
        return jnp.take_along_axis(x_btv, ids_btk, axis=-1)
    places = jnp.arange(x_btv.shape[-1])
    picked = [
        jnp.sum(jnp.where(places == ids_btk[..., j, None], x_btv, 0.0), axis=-1)
        for j in range(ids_btk.shape[-1])
    ]
    return jnp.stack(picked, axis=-1)


def _nll(logq: jax.Array, targets: jax.Array) -> jax.Array:
    return -at_ids(logq, targets[..., None])[..., 0]


def plain_terms(logits_q: jax.Array, targets: jax.Array) -> Sums:
    """The data is the teacher: p is 1 at the target, so KL(p || q) is the cross-entropy."""
    logq = jax.nn.log_softmax(logits_q)
    nll = _nll(logq, targets)
    agree = (-nll >= jnp.max(logq, axis=-1)).astype(jnp.float32)
    one, zero = jnp.ones_like(nll), jnp.zeros_like(nll)
    return Sums(nll, one, one, nll, nll, agree, zero, one)


class Compared(NamedTuple):
    """Of each token, float32."""

    kl: jax.Array  # KL(p || q), nats
    nll: jax.Array  # of the target under q, nats
    entropy: jax.Array  # of p, nats
    agree: jax.Array  # 1.0 where both have the same most likely token


@jax.custom_vjp
def compare(z_q: jax.Array, z_p: jax.Array, targets: jax.Array) -> Compared:
    """Of float32 logits [..., V] and targets [...]; kl and nll have a gradient, that of z_q. Equal
    logits have a KL of exactly 0."""
    return _compare(z_q, z_p, targets)[0]


def _compare(z_q: jax.Array, z_p: jax.Array, targets: jax.Array) -> tuple[Compared, Any]:
    sums = one_pass if devices.platform() == "gpu" and not mesh.is_sharded(z_q, -1) else two_passes
    found, normalisers = sums(z_q, z_p, targets)
    return found, (z_q, z_p, targets, *normalisers)


def two_passes(z_q: jax.Array, z_p: jax.Array, targets: jax.Array) -> tuple[Compared, Any]:
    """What `compare` gives, and logsumexp of both: once the greatest logits are known everything is
    sums over one more pass through both."""
    top_q, top_p = jnp.max(z_q, -1, keepdims=True), jnp.max(z_p, -1, keepdims=True)
    x_q, x_p = z_q - top_q, z_p - top_p
    e_p = jnp.exp(x_p)
    sum_q, sum_p = jnp.sum(jnp.exp(x_q), -1), jnp.sum(e_p, -1)
    of_q, of_p = jnp.sum(e_p * x_q, -1) / sum_p, jnp.sum(e_p * x_p, -1) / sum_p
    log_q, log_p = jnp.log(sum_q), jnp.log(sum_p)
    nll = log_q - jnp.sum(jnp.where(_is_target(z_q, targets), x_q, 0.0), -1)
    both = jnp.where((x_q >= 0) & (x_p >= 0), 1.0, 0.0)
    agree = jnp.minimum(jnp.sum(both, -1), 1.0)
    found = Compared((of_p - of_q) + (log_q - log_p), nll, log_p - of_p, agree)
    return found, (log_q + top_q[..., 0], log_p + top_p[..., 0])


def one_pass(z_q: jax.Array, z_p: jax.Array, targets: jax.Array) -> tuple[Compared, Any]:
    """The same in a single pass: on a GPU logits in memory are what a loss costs beside products.

    Exponentials are of the logits less the greatest of the first SAMPLE outcomes, as that of all is
    not known yet. Where it is n nats above, float32 gives an entropy to some n * 1e-6; where it is
    more than NEAR for any token, all is done again, `online`.
    """
    ref_q, ref_p = (jnp.max(z[..., :SAMPLE], -1) for z in (z_q, z_p))
    by_kernel = devices.is_hopper() and z_q.ndim == 3 and z_q.shape[-1] % 128 == 0
    sums_below = _below_by_kernel if by_kernel else _below
    top_q, top_p, at_top, at_target, *sums = sums_below(z_q, z_p, ref_q, ref_p, targets)
    far = jnp.any((top_q > NEAR) | (top_p > NEAR))
    near = _compared((ref_q, ref_p), at_top >= top_q, at_target, sums)
    return jax.lax.cond(far, lambda: online(z_q, z_p, targets), lambda: near)


def _below(
    z_q: jax.Array, z_p: jax.Array, ref_q: jax.Array, ref_p: jax.Array, targets: jax.Array
) -> Sequence[jax.Array]:
    """What `_reduce` gives of logits less the references, with the four sums of `_compared`."""
    x_q, x_p = z_q - ref_q[..., None], z_p - ref_p[..., None]
    e_p = jnp.exp(x_p)
    terms = (jnp.exp(x_q), e_p, e_p * (x_p - x_q), e_p * x_p)

    def merge(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        sums = (x + y for x, y in zip(a[3:], b[3:], strict=True))
        return (*_greatest(a, b), *sums)

    return _reduce(merge, x_q, x_p, targets, terms)


def _below_by_kernel(*arrays: jax.Array) -> Sequence[jax.Array]:
    """The same of arrays [B, T, ...] by a kernel."""
    from e3jax.hopper import sums as kernels

    found = mesh.on_own_tokens(kernels.row_sums, *arrays)
    return [found[..., i] for i in range(found.shape[-1])]


def online(z_q: jax.Array, z_p: jax.Array, targets: jax.Array) -> tuple[Compared, Any]:
    """The same for any logits: each sum is scaled anew where a greater logit comes (online softmax,
    arXiv 1805.02867). Twice the time of `one_pass` on a GPU."""

    def merge(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        # Of two greatest logits one is the greater: an exponential for both, not one for each.
        above_q, above_p = a[0] - b[0], a[1] - b[1]
        e_q, e_p = jnp.exp(-jnp.abs(above_q)), jnp.exp(-jnp.abs(above_p))
        sum_q, sum_p, apart, of_p = jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.float32(0)
        for part, up_q, up_p in ((a, above_q, above_p), (b, -above_q, -above_p)):
            down_q, down_p = jnp.minimum(up_q, 0), jnp.minimum(up_p, 0)
            scale_q, scale_p = jnp.where(up_q < 0, e_q, 1.0), jnp.where(up_p < 0, e_p, 1.0)
            sum_q = sum_q + part[4] * scale_q
            sum_p = sum_p + part[5] * scale_p
            apart = apart + (part[6] + (down_p - down_q) * part[5]) * scale_p
            of_p = of_p + (part[7] + down_p * part[5]) * scale_p
        return (*_greatest(a, b), a[3] + b[3], sum_q, sum_p, apart, of_p)

    one, none = jnp.ones_like(z_q), jnp.zeros_like(z_q)
    found = _reduce(merge, z_q, z_p, targets, (one, one, none, none))
    top_q, top_p, at_top, at_target, *sums = found
    return _compared((top_q, top_p), at_top >= top_q, at_target - top_q, sums)


def _greatest(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The greatest of q and of p, and q's where p's is, of two parts that have them."""
    at_top = jnp.where(a[1] > b[1], a[2], b[2])
    at_top = jnp.where(a[1] == b[1], jnp.maximum(a[2], b[2]), at_top)
    return jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1]), at_top


def _reduce(
    merge: Callable[..., Any], q: jax.Array, p: jax.Array, targets: jax.Array, terms: Sequence
) -> Sequence[jax.Array]:
    """Over the last axis: the greatest q and p, q's where p's is, q at the target, and `terms`."""
    least, zero = np.float32(np.finfo(np.float32).min), np.float32(0)
    at_target = jnp.where(_is_target(q, targets), q, 0.0)
    start = (least, least, least, *(zero,) * (1 + len(terms)))
    return jax.lax.reduce((q, p, q, at_target, *terms), start, merge, (q.ndim - 1,))


def _compared(
    refs: tuple[jax.Array, jax.Array],
    agree: jax.Array,
    target: jax.Array,
    sums: Sequence[jax.Array],
) -> tuple[Compared, Any]:
    """From the sums of e^q, e^p, e^p (p - q) and e^p p, all below the references."""
    sum_q, sum_p, apart, of_p = sums
    log_q, log_p = jnp.log(sum_q), jnp.log(sum_p)
    kl, entropy = apart / sum_p + (log_q - log_p), log_p - of_p / sum_p
    found = Compared(kl, log_q - target, entropy, jnp.where(agree, 1.0, 0.0))
    return found, (log_q + refs[0], log_p + refs[1])


def _is_target(z: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.arange(z.shape[-1]) == targets[..., None]


def _compare_backward(kept: Any, g: Compared) -> tuple[jax.Array, None, None]:
    z_q, z_p, targets, normaliser_q, normaliser_p = kept
    q, p = (jnp.exp(z - n[..., None]) for z, n in ((z_q, normaliser_q), (z_p, normaliser_p)))
    target = jnp.where(_is_target(z_q, targets), g.nll[..., None], 0.0)
    return (g.kl + g.nll)[..., None] * q - g.kl[..., None] * p - target, None, None


compare.defvjp(_compare, _compare_backward)


def online_terms(
    logits_p: jax.Array, logits_q: jax.Array, targets: jax.Array, o: Objective, mean: Any
) -> Sums:
    found = compare(logits_q, logits_p, targets)
    loss, h_p = found.kl, found.entropy
    if o.temperature != 1.0 or o.divergence != "forward_kl":
        z_q, z_p = logits_q / o.temperature, logits_p / o.temperature
        tempered = compare(z_q, z_p, targets)
        loss, h_p = tempered.kl, tempered.entropy
        if o.divergence != "forward_kl":
            loss = divergence(jax.nn.log_softmax(z_p), jax.nn.log_softmax(z_q), o)
    h_q = h_p
    if o.weight in ("student", "joint"):
        h_q = entropy(jax.nn.log_softmax(logits_q / o.temperature))
    return _terms(
        loss,
        found.nll,
        token_weight(h_p, h_q, mean, logits_q.shape[-1], o),
        kl=jax.lax.stop_gradient(found.kl),
        agree=found.agree,
        h_p=h_p,
        captured=jnp.ones_like(h_p),
        o=o,
    )


def stored_terms(
    teacher: TopK, logits_q: jax.Array, targets: jax.Array, o: Objective, mean: Any
) -> Sums:
    plain_q = jax.nn.log_softmax(logits_q)
    full_q = plain_q if o.temperature == 1.0 else jax.nn.log_softmax(logits_q / o.temperature)
    logp, logq = teacher.logp.astype(jnp.float32), at_ids(full_q, teacher.ids)
    captured = jnp.minimum(jnp.sum(jnp.exp(logp), axis=-1), 1.0)
    bucket_p, bucket_q = _with_tail(logp), _with_tail(logq)
    if o.tail == "bucket":
        loss = divergence(bucket_p, bucket_q, o)
    elif o.tail == "renormalise":
        loss = divergence(jax.nn.log_softmax(logp), logq, o)
    else:
        loss = divergence(logp, logq, o)
    h_q = teacher.entropy
    if o.weight in ("student", "joint"):
        h_q = entropy(full_q)
    top = jax.lax.stop_gradient(logq[..., 0] >= jnp.max(full_q, axis=-1))
    return _terms(
        loss,
        _nll(plain_q, targets),
        token_weight(teacher.entropy, h_q, mean, logits_q.shape[-1], o),
        kl=jax.lax.stop_gradient(jnp.sum(jnp.exp(bucket_p) * (bucket_p - bucket_q), axis=-1)),
        agree=top.astype(jnp.float32),
        h_p=teacher.entropy,
        captured=captured,
        o=o,
    )


def _with_tail(logp: jax.Array) -> jax.Array:
    """k log-probabilities -> k + 1, the last the mass that remains.

    float16 storage may add up to more than 1: what is captured is held below 1 - 1e-6.
    """
    captured = jnp.minimum(jax.nn.logsumexp(logp, axis=-1, keepdims=True), -1e-6)
    return jnp.concatenate([logp, jnp.log(-jnp.expm1(captured))], axis=-1)


def _terms(
    loss: jax.Array,
    nll: jax.Array,
    weight: jax.Array,
    *,
    kl: jax.Array,
    agree: jax.Array,
    h_p: jax.Array,
    captured: jax.Array,
    o: Objective,
) -> Sums:
    """T^2 keeps the gradient's size as the temperature changes (Hinton et al. 2015)."""
    loss = o.temperature**2 * loss
    if o.ce:  # else nll's gradient would be another pass over the logits
        loss = (1 - o.ce) * loss + o.ce * nll
    one = jnp.ones_like(nll)
    return Sums(weight * loss, weight, one, jax.lax.stop_gradient(nll), kl, agree, h_p, captured)
