"""The losses of both stages, chunked over tokens: logits exist one chunk at a time.

Everything is a sum over tokens for each row of the batch, in float32; callers add rows,
micro-batches and hosts, and divide once. What a token's loss is: terms.py.
"""

from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.distill import terms
from e3jax.distill.terms import Compared, Objective, Online, Sums, TopK, entropy
from e3jax.errors import UserError
from e3jax.models.head import AXES, Head, as_head, finished, gathered, products, unembed
from e3jax.models.product import wide_product


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


def token_sums(
    h: jax.Array,
    head: Head | jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    teacher: Online | TopK | None,
    objective: Objective,
    mean_entropy: jax.Array | float = 1.0,
    *,
    frozen_head: bool = False,
) -> tuple[jax.Array, Sums]:
    """The objective added up over all tokens, a float32 scalar and the one result that has a
    gradient; and the sums of each row.

    h: student's final hidden states [B, T, D]; head: as it is stored, whole or sharded;
    targets int32, mask bool [B, T]. An online teacher may have fewer rows, each for as many of the
    student's that follow one another. The gradient is that of h, and of the head unless
    frozen_head; it adds up over chunks in float32.
    teacher None: next-token cross-entropy alone, which is KL from the targets. mean_entropy: H of
    the weights, nats.
    Raises UserError when the objective cannot be computed from the teacher's stored top-k.
    """
    _check(objective, teacher)
    given, facts = _Given(targets, mask, teacher, jnp.float32(mean_entropy)), as_head(head)

    @jax.custom_vjp
    def sums(h: jax.Array, head: jax.Array, given: _Given) -> tuple[jax.Array, Sums]:
        found, _ = _scan(h, facts.replace(matrix=head), given, objective, None)
        return jnp.sum(found.loss), found

    def forward(h: jax.Array, head: jax.Array, given: _Given) -> tuple[Any, Any]:
        wanted = "h" if frozen_head else "both"
        found, grads = _scan(h, facts.replace(matrix=head), given, objective, wanted)
        return (jnp.sum(found.loss), found), grads

    def backward(grads: Any, cotangents: Any) -> tuple:
        d_h, d_head = grads
        d_head = None if d_head is None else (cotangents[0] * d_head).astype(facts.matrix.dtype)
        return (cotangents[0] * d_h).astype(h.dtype), d_head, None

    sums.defvjp(forward, backward)
    return sums(h, facts.matrix, given)


@flax.struct.dataclass
class _Given:
    """What has no gradient."""

    targets: jax.Array
    mask: jax.Array
    teacher: Online | TopK | None
    mean_entropy: jax.Array


def _scan(
    h: jax.Array,
    head: Head,
    given: _Given,
    objective: Objective,
    wanted: Literal["h", "both"] | None,
) -> tuple[Sums, tuple[jax.Array | None, jax.Array | None]]:
    """Sums of each row, and what is `wanted` of the gradients of their loss, chunk by chunk.

    A chunk's gradients are taken while its logits are there: backward would make them once more,
    the teacher's too.
    """
    teacher = given.teacher
    per_token: tuple[jax.Array, ...] = (h, given.targets, given.mask)
    # In h's dtype at once: half the bytes to gather, and not made again for each chunk.
    head_q, head_p = gathered(head, h.dtype), None
    if isinstance(teacher, Online):
        head_p = gathered(as_head(teacher.head), h.dtype)
        per_token = (*per_token, teacher.h)
    elif teacher is not None:
        per_token = (*per_token, teacher.ids, teacher.logp, teacher.entropy)

    def row_sums(made_q: jax.Array, targets: jax.Array, mask: jax.Array, *rest: jax.Array) -> Any:
        logits_q, mean = finished(made_q, head_q), given.mean_entropy
        if isinstance(teacher, Online):
            logits_p = unembed(rest[0], head_p)
            logits_p = mesh.repeat_rows(logits_p, len(logits_q) // len(logits_p))
            found = terms.online_terms(logits_p, logits_q, targets, objective, mean)
        elif teacher is not None:
            found = terms.stored_terms(TopK(*rest), logits_q, targets, objective, mean)
        else:
            found = terms.plain_terms(logits_q, targets)
        rows = jax.tree.map(lambda x: jnp.sum(jnp.where(mask, x, 0.0), axis=1), found)
        return jnp.sum(rows.loss), rows

    def chunk(x: tuple[jax.Array, ...]) -> tuple[tuple[Sums, Any], Any]:
        """What adds up over chunks, and the gradient of the chunk's own h."""
        h, *rest = x
        made_q = products(h, head_q.matrix)
        if wanted is None:
            return (row_sums(made_q, *rest)[1], None), None
        grad, rows = jax.grad(row_sums, has_aux=True)(made_q, *rest)
        grad = grad.astype(h.dtype)
        out = mesh.out(("batch", None, None), h.shape)
        d_h = wide_product("btv,vd->btd", grad, head_q.matrix, out)
        if wanted == "h":
            return (rows, None), d_h.astype(h.dtype)
        d_head = wide_product("btv,btd->vd", grad, h, mesh.unreduced(AXES, head.matrix.shape))
        return (rows, d_head), d_h.astype(h.dtype)

    size = positions(h.shape, objective.chunk)
    xs = tuple(split_time(x, size) for x in per_token)
    shapes, _ = jax.eval_shape(chunk, tuple(x[0] for x in xs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=_place(s)), shapes)

    def add(total: Any, x: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        now, d_h = chunk(x)
        return jax.tree.map(jnp.add, total, now), d_h

    (sums, d_head), d_h = jax.lax.scan(add, zeros, xs)
    if d_h is not None:
        d_h = join_time(d_h, h.shape[1])
    return sums, (d_h, None if d_head is None else mesh.scatter(d_head, AXES))


def positions(shape: tuple[int, ...], chunk: int) -> int:
    """Of a row of [B, T, ...] in a slice of at most `chunk` tokens (at least one position) of the
    rows that a device holds.

    Were `chunk` counted over all devices, a pod would multiply a few positions at a time.
    """
    rows, time = shape[:2]
    return min(time, max(1, chunk // -(-rows // mesh.row_shards())))


def split_time(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [count, B, size, ...], the last slice padded with zeros."""
    rows, time = x.shape[:2]
    count = -(-time // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - time)) + ((0, 0),) * (x.ndim - 2))
    shape = (rows, count, size, *x.shape[2:])
    # Said here, since of a batch of one row a reshape forgets over which axes it is spread.
    place = mesh.out(("batch",) + (None,) * x.ndim, shape)
    return jnp.moveaxis(x.reshape(shape, out_sharding=place), 1, 0)


def join_time(x: jax.Array, time: int) -> jax.Array:
    """What `split_time` made, put together again: [count, B, size, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    shape = (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    place = mesh.out(("batch",) + (None,) * (len(shape) - 1), shape)
    return x.reshape(shape, out_sharding=place)[:, :time]


def _place(x: Any) -> Any:
    return None if mesh.current() is None else x.sharding.spec


def _check(objective: Objective, teacher: Online | TopK | None) -> None:
    needs_tail = isinstance(teacher, TopK) and objective.divergence != "forward_kl"
    if needs_tail and objective.tail != "bucket":
        raise UserError(
            f"distill.divergence={objective.divergence} from a teacher cache needs "
            f"distill.tail=bucket, not {objective.tail}: the tail has no probability otherwise"
        )


def each_token(
    h_q: jax.Array,
    head_q: Head | jax.Array,
    h_p: jax.Array,
    head_p: Head | jax.Array,
    targets: jax.Array,
    chunk: int,
) -> Compared:
    """Student q beside teacher p at every token, float32 [B, T]; arrays as in `token_sums`."""
    heads = [gathered(as_head(head), h_q.dtype) for head in (head_q, head_p)]

    def one(x: tuple[jax.Array, ...]) -> Compared:
        h_q, h_p, targets = x
        return terms.compare(unembed(h_q, heads[0]), unembed(h_p, heads[1]), targets)

    size = positions(h_q.shape, chunk)
    found = jax.lax.map(one, tuple(split_time(x, size) for x in (h_q, h_p, targets)))
    return jax.tree.map(lambda x: join_time(x, h_q.shape[1]), found)


def teacher_topk(
    h: jax.Array, head: Head | jax.Array, k: int, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What a teacher cache stores: ids int32 and log-probabilities [B, T, k], most likely first,
    entropy and log-normaliser float32 [B, T]; all of the distribution at `temperature`.
    """
    whole = gathered(as_head(head), h.dtype)

    def one(h: jax.Array) -> tuple[jax.Array, ...]:
        scores = unembed(h, whole) / temperature
        if mesh.current() is not None:  # top_k needs the whole vocabulary
            scores = jax.sharding.reshard(scores, mesh.spec(("batch", None, None)))
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        logp = scores - normaliser[..., None]
        top, ids = jax.lax.top_k(logp, k)
        return ids.astype(jnp.int32), top, entropy(logp), normaliser

    ids, top, h_p, normaliser = (
        join_time(x, h.shape[1]) for x in jax.lax.map(one, split_time(h, positions(h.shape, chunk)))
    )
    return ids, top, h_p, normaliser
