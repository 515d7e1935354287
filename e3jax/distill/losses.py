"""The losses of both stages, chunked over tokens: logits exist one chunk at a time.

p is the teacher (dense model), q the student. Everything is a sum over tokens for each row of the
batch, in float32; callers add rows, micro-batches and hosts, and divide once.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import config, mesh
from e3jax.errors import UserError
from e3jax.models.decoder import unembed


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
    head: jax.Array


@flax.struct.dataclass
class TopK:
    """A stored teacher: its k most likely tokens at the distillation temperature."""

    ids: jax.Array  # int32 [B, T, k]
    logp: jax.Array  # [B, T, k], full-vocabulary log-probabilities, read as float32
    entropy: jax.Array  # float32 [B, T], of the full vocabulary, nats


def abstract_topk(rows: int, time: int, k: int) -> TopK:
    """ShapeDtypeStructs of stored rows, as a teacher cache reads them."""

    def stored(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        place = mesh.sharding(("batch",) + (None,) * (len(shape) - 1), shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    return TopK(
        ids=stored((rows, time, k), jnp.int32),
        logp=stored((rows, time, k), jnp.float16),
        entropy=stored((rows, time), jnp.float32),
    )


@flax.struct.dataclass
class Sums:
    """Sums over the masked tokens of each row, float32 [B]."""

    loss: jax.Array  # sum of w * loss: what is differentiated
    weight: jax.Array  # sum of w: what it is divided by
    tokens: jax.Array
    nll: jax.Array  # next-token cross-entropy, nats
    kl: jax.Array  # KL(p || q) at temperature 1 (stored teacher: of its k + 1 outcomes, at its own)
    agree: jax.Array  # tokens where p and q have the same most likely token
    entropy: jax.Array  # of p, nats
    captured: jax.Array  # mass of p in the outcomes seen: 1 a token, less with a stored teacher


def token_sums(
    h: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    teacher: Online | TopK | None,
    objective: Objective,
    mean_entropy: jax.Array | float = 1.0,
) -> Sums:
    """Sums of the objective for each row.

    h: student's final hidden states [B, T, D]; head: [V, D], float32 if it is to be trained (its
    gradient accumulates over chunks in its own dtype); targets int32, mask bool [B, T].
    teacher None: next-token cross-entropy alone, which is KL from the targets. mean_entropy: H of
    the weights, nats.
    Raises UserError when the objective cannot be computed from the teacher's stored top-k.
    """
    _check(objective, teacher)
    per_token = (h, targets, mask)
    frozen_head = None
    if isinstance(teacher, Online):
        per_token, frozen_head = (*per_token, teacher.h), teacher.head
    elif teacher is not None:
        per_token = (*per_token, teacher.ids, teacher.logp, teacher.entropy)

    def chunk_sums(h: jax.Array, targets: jax.Array, mask: jax.Array, *rest: jax.Array) -> Sums:
        logits_q = unembed(h, head)
        if isinstance(teacher, Online):
            logits_p = jax.lax.stop_gradient(unembed(rest[0], frozen_head))
            terms = _online_terms(logits_p, logits_q, targets, objective, mean_entropy)
        elif teacher is not None:
            terms = _stored_terms(TopK(*rest), logits_q, targets, objective, mean_entropy)
        else:
            terms = _plain_terms(logits_q, targets)
        return jax.tree.map(lambda x: jnp.sum(jnp.where(mask, x, 0.0), axis=1), terms)

    return sum_over_chunks(chunk_sums, per_token, objective.chunk)


def sum_over_chunks(fn: Callable[..., Any], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
    """Sum of fn over slices of about `chunk` tokens a device; backward recomputes each.

    arrays: [B, T, ...]; they are padded with zeros at the end, so fn must see a mask. The batch
    axis keeps its sharding: a chunk is a few positions of every row.
    """
    xs = tuple(split_time(x, chunk) for x in arrays)
    remat = jax.checkpoint(fn, prevent_cse=False)
    shapes = jax.eval_shape(fn, *(x[0] for x in xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=_place(s)), shapes)
    total, _ = jax.lax.scan(
        lambda sums, x: (jax.tree.map(jnp.add, sums, remat(*x)), None), zeros, xs
    )
    return total


def split_time(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [count, B, size, ...], slices of at most `chunk` tokens (or one position) of
    the rows that a device holds, the last padded with zeros.

    Were `chunk` counted over all devices, a pod would multiply a few positions at a time.
    """
    rows, time = x.shape[:2]
    set_mesh = mesh.current()
    shards = 1 if set_mesh is None else mesh.axis_size(set_mesh, mesh.BATCH)
    size = min(time, max(1, chunk // -(-rows // shards)))
    count = -(-time // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - time)) + ((0, 0),) * (x.ndim - 2))
    shape = (rows, count, size, *x.shape[2:])
    # Said here, since of a batch of one row a reshape forgets over which axes it is spread.
    place = mesh.out(("batch",) + (None,) * x.ndim, shape)
    return jnp.moveaxis(x.reshape(shape, out_sharding=place), 1, 0)


def _place(x: Any) -> Any:
    return None if mesh.current() is None else x.sharding.spec


def _check(objective: Objective, teacher: Online | TopK | None) -> None:
    needs_tail = isinstance(teacher, TopK) and objective.divergence != "forward_kl"
    if needs_tail and objective.tail != "bucket":
        raise UserError(
            f"distill.divergence={objective.divergence} from a teacher cache needs "
            f"distill.tail=bucket, not {objective.tail}: the tail has no probability otherwise"
        )


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


def _plain_terms(logits_q: jax.Array, targets: jax.Array) -> Sums:
    """The data is the teacher: p is 1 at the target, so KL(p || q) is the cross-entropy."""
    logq = jax.nn.log_softmax(logits_q)
    nll = _nll(logq, targets)
    agree = (-nll >= jnp.max(logq, axis=-1)).astype(jnp.float32)
    one, zero = jnp.ones_like(nll), jnp.zeros_like(nll)
    return Sums(nll, one, one, nll, nll, agree, zero, one)


def _online_terms(
    logits_p: jax.Array, logits_q: jax.Array, targets: jax.Array, o: Objective, mean: Any
) -> Sums:
    plain_p, plain_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    logp, logq = plain_p, plain_q
    if o.temperature != 1.0:
        logp = jax.nn.log_softmax(logits_p / o.temperature)
        logq = jax.nn.log_softmax(logits_q / o.temperature)
    h_p = entropy(logp)
    h_q = entropy(logq) if o.weight in ("student", "joint") else h_p
    kl = jnp.sum(jnp.exp(plain_p) * (plain_p - plain_q), axis=-1)
    agree = jnp.sum(
        jnp.where(
            (logits_p >= jnp.max(logits_p, -1, keepdims=True))
            & (logits_q >= jnp.max(logits_q, -1, keepdims=True)),
            1.0,
            0.0,
        ),
        axis=-1,
    )
    return _terms(
        divergence(logp, logq, o),
        _nll(plain_q, targets),
        token_weight(h_p, h_q, mean, logits_q.shape[-1], o),
        kl=jax.lax.stop_gradient(kl),
        agree=jnp.minimum(agree, 1.0),
        h_p=h_p,
        captured=jnp.ones_like(h_p),
        o=o,
    )


def _stored_terms(
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
    loss = (1 - o.ce) * o.temperature**2 * loss + o.ce * nll
    one = jnp.ones_like(nll)
    return Sums(weight * loss, weight, one, jax.lax.stop_gradient(nll), kl, agree, h_p, captured)


def teacher_topk(
    h: jax.Array, head: jax.Array, k: int, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What a teacher cache stores: ids int32 and log-probabilities [B, T, k], most likely first,
    entropy and log-normaliser float32 [B, T]; all of the distribution at `temperature`.
    """

    def one(h: jax.Array) -> tuple[jax.Array, ...]:
        scores = unembed(h, head) / temperature
        if mesh.current() is not None:  # top_k needs the whole vocabulary
            scores = jax.sharding.reshard(scores, mesh.spec(("batch", None, None)))
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        logp = scores - normaliser[..., None]
        top, ids = jax.lax.top_k(logp, k)
        return ids.astype(jnp.int32), top, entropy(logp), normaliser

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : h.shape[1]]

    ids, top, h_p, normaliser = jax.lax.map(one, split_time(h, chunk))
    return join(ids), join(top), join(h_p), join(normaliser)
