"""From logits to a token: the distribution that a request asks for, and a draw from it.

The order is that of transformers: repetition penalty (arXiv 1909.05858), temperature, top-k, top-p
(arXiv 1904.09751), min-p (arXiv 2407.01082). Each row of a batch has its own; one program serves
all. Of tokens that are exactly as likely as the last one kept, top-p keeps all and not some.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Sampling:
    """What each of B rows asks for."""

    temperature: jax.Array  # float32 [B], 0 = the most likely token
    top_k: jax.Array  # int32 [B], 0 = all
    top_p: jax.Array  # float32 [B], 1 = all
    min_p: jax.Array  # float32 [B], 0 = all
    repetition_penalty: jax.Array  # float32 [B], 1 = none
    seed: jax.Array  # uint32 [B]


def next_token(
    logits_bv: jax.Array, ask: Sampling, seen_bv: jax.Array, count_b: jax.Array
) -> jax.Array:
    """int32 [B]; logits: float32. seen: bool, the tokens of prompt and answer. count: int32, tokens
    of the answer so far; the draw depends on it and on the row's seed, and on no other row."""
    logits = penalised(logits_bv, ask, seen_bv)

    def drawn() -> jax.Array:
        found = logits / jnp.where(ask.temperature > 0, ask.temperature, 1.0)[:, None]
        some = (ask.top_k > 0) | (ask.top_p < 1) | (ask.min_p > 0)
        # Sorting a vocabulary takes longer than all the rest.
        found = jax.lax.cond(jnp.any(some), lambda: likely(found, ask), lambda: found)
        return found + _noise(ask.seed, count_b, found.shape[1])

    random = ask.temperature > 0
    found = jax.lax.cond(
        jnp.any(random), lambda: jnp.where(random[:, None], drawn(), logits), lambda: logits
    )
    return jnp.argmax(found, axis=-1).astype(jnp.int32)


def distribution(logits_bv: jax.Array, ask: Sampling, seen_bv: jax.Array) -> jax.Array:
    """The probabilities [B, V] that `next_token` draws by, of rows whose temperature is not 0."""
    logits = penalised(logits_bv, ask, seen_bv) / ask.temperature[:, None]
    return jax.nn.softmax(likely(logits, ask), axis=-1)


def penalised(logits_bv: jax.Array, ask: Sampling, seen_bv: jax.Array) -> jax.Array:
    """Logits of tokens that were there before are divided by the penalty, negative ones multiplied
    by it."""
    by = ask.repetition_penalty[:, None]
    less = jnp.where(logits_bv > 0, logits_bv / by, logits_bv * by)
    return jnp.where(seen_bv, less, logits_bv)


def likely(logits_bv: jax.Array, ask: Sampling) -> jax.Array:
    """-inf where top-k, top-p or min-p exclude the token. All three keep what is above a limit."""
    size = logits_bv.shape[1]
    descending = -jnp.sort(-logits_bv, axis=-1)
    last = jnp.where(ask.top_k > 0, jnp.minimum(ask.top_k, size), size) - 1
    least = jnp.take_along_axis(descending, last[:, None], axis=1)
    weights = jnp.where(descending >= least, jnp.exp(descending - descending[:, :1]), 0.0)
    before = jnp.cumsum(weights, axis=1) - weights  # of the tokens that are likelier
    share = ask.top_p[:, None]
    # Rounded, the sum before the last ones may be that of all.
    among = (before < share * jnp.sum(weights, axis=1, keepdims=True)) | (share >= 1)
    among = (among & (descending >= least)).at[:, 0].set(True)
    least = jnp.min(jnp.where(among, descending, jnp.inf), axis=1, keepdims=True)
    # log(0) = -inf: nothing is excluded
    least = jnp.maximum(least, descending[:, :1] + jnp.log(ask.min_p)[:, None])
    return jnp.where(logits_bv >= least, logits_bv, -jnp.inf)


def _noise(seed_b: jax.Array, count_b: jax.Array, size: int) -> jax.Array:
    """Gumbel noise, float32 [B, V]: with it the greatest is a draw from the softmax."""

    def of_row(seed: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), (size,))

    return jax.vmap(of_row)(seed_b, count_b)
