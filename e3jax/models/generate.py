"""Greedy decoding with a key-value cache: batched, one jit, stops when every row has ended.

Prompts are padded on the left, so every row writes the same column of the cache at each step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh, processes
from e3jax.models import decoder, rope
from e3jax.models.attention import attend, causal_mask, make_attention, select_mask
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params

Cache = tuple[jax.Array, jax.Array]  # keys and values
CACHE = (None, "batch", None, "heads", None)  # [L, B, S, K, H]


def left_pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segments (0 = padding, 1 = prompt), both int32 [B, width]."""
    tokens = np.zeros((len(prompts), width), np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
        segments[row, width - len(ids) :] = 1
    return tokens, segments


def make_greedy(
    cfg: ModelConfig, *, dtype: Any, max_new_tokens: int, eos: Sequence[int]
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """A jitted (params, tokens [B, T], segments [B, T]) -> int32 [B, max_new_tokens].

    Rows hold the generated ids up to and including the first of `eos`, then -1.
    """

    def next_token(params: Params, h_btd: jax.Array) -> jax.Array:
        h = decoder.rms_norm(h_btd[:, -1:], params["final_norm"], cfg.norm_eps)
        scores = decoder.logits(params, h, cfg)[:, 0]
        if mesh.current() is not None:  # argmax needs the whole vocabulary
            scores = jax.sharding.reshard(scores, mesh.spec(("batch", None)))
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def forward(
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        column: jax.Array | int,
        see: Callable[..., jax.Array],
    ) -> tuple[jax.Array, Cache]:
        """Runs all layers on new tokens whose keys and values go to `column` of the cache on.

        see: attention as (kind of layer, q, (k, v) of the new tokens, (k, v) of the whole cache).
        """
        cos_sin = rope.angles(positions, cfg.rope, cfg.head_dim)

        def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            h, cache = carry
            w, kind, index = xs

            def extend_and_see(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal cache
                at = (index, 0, column, 0, 0)
                cache = tuple(
                    jax.lax.dynamic_update_slice(stack, new[None], at)
                    for stack, new in zip(cache, (k, v), strict=True)
                )
                return see(kind, q, (k, v), (cache[0][index], cache[1][index]))

            h = decoder.layer(w, h, cos_sin, extend_and_see, cfg)
            return (h, cache), None

        h = decoder.embed(params, tokens, dtype)
        _, kind_l = decoder.window_kinds(cfg)
        xs = (params["layers"], kind_l, jnp.arange(cfg.num_layers))
        (h, cache), _ = jax.lax.scan(body, (h, cache), xs)
        return h, cache

    @jax.jit
    def greedy(params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        kinds, _ = decoder.window_kinds(cfg)
        eos_ids = jnp.asarray(list(eos) or [-1], jnp.int32)
        rows, width = tokens.shape
        total = width + max_new_tokens
        shape = (cfg.num_layers, rows, total, cfg.num_kv_heads, cfg.head_dim)
        cache = tuple(
            jnp.zeros(shape, dtype, out_sharding=mesh.out(CACHE, shape)) for _ in range(2)
        )
        pad = width - jnp.sum(segments, axis=1)
        # Padding is segment 0; what will be generated belongs to the prompt's segment, 1.
        ahead = jnp.pad(segments, ((0, 0), (0, max_new_tokens)), constant_values=1)
        positions = jnp.maximum(jnp.arange(width)[None] - pad[:, None], 0)
        among_prompt = make_attention(segments, kinds, cfg.head_dim)

        def see_prompt(kind: jax.Array, q: jax.Array, new: Cache, _: Cache) -> jax.Array:
            return among_prompt(kind, q, *new)

        h, cache = forward(params, tokens, positions, cache, 0, see_prompt)
        first = next_token(params, h)
        answer = jnp.pad(tokens[:, :0], ((0, 0), (0, max_new_tokens)), constant_values=-1)

        def running(state: tuple) -> jax.Array:
            step, _, done, _, _ = state
            return (step < max_new_tokens) & ~jnp.all(done)

        def decode(state: tuple) -> tuple:
            step, token, done, answer, cache = state
            token = jnp.where(done, -1, token)
            answer = jax.lax.dynamic_update_slice(answer, token[:, None], (0, step))
            done |= jnp.any(token[:, None] == eos_ids, axis=1)
            column = width + step
            masks = [causal_mask(ahead, window, column, 1) for window in kinds]

            def see_cache(kind: jax.Array, q: jax.Array, _: Cache, cache: Cache) -> jax.Array:
                return attend(q, *cache, select_mask(kind, masks))

            token, position = jnp.maximum(token, 0)[:, None], (column - pad)[:, None]
            h, cache = forward(params, token, position, cache, column, see_cache)
            return step + 1, next_token(params, h), done, answer, cache

        state = (jnp.int32(0), first, jnp.zeros_like(first, bool), answer, cache)
        return jax.lax.while_loop(running, decode, state)[3]

    return greedy


def generate(
    greedy: Callable[[Params, jax.Array, jax.Array], jax.Array],
    params: Params,
    prompts: Sequence[Sequence[int]],
    batch: int,
) -> Iterator[list[int]]:
    """Answers to all prompts in order, as token ids without the padding; one compilation."""
    width = -(-max(map(len, prompts)) // 16) * 16
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        filled = part + [part[0]] * (batch - len(part))
        rows = mesh.rows_here(batch)
        tokens, segments = left_pad(filled, width)
        answers = greedy(params, *mesh.shard_batch((tokens[rows], segments[rows])))
        for row in processes.whole(answers)[: len(part)]:
            yield [int(t) for t in row if t >= 0]
