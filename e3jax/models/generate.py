"""Greedy decoding with a key-value cache: batched, jitted, stops when every row has ended.

Prompts are padded on the left, so every row writes the same column of the cache at each step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.struct
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
TOGETHER = 128  # tokens a row that one call decodes; in between the host can speak and stop


@flax.struct.dataclass
class Decoding:
    """B rows in the midst of their answers; N is the longest answer, T the prompts' width."""

    step: jax.Array  # int32, tokens of the answers so far
    token: jax.Array  # int32 [B], the next one
    done: jax.Array  # bool [B], an end-of-sequence token is in the answer
    answer: jax.Array  # int32 [B, N], -1 beyond the answer
    cache: Cache  # of T + N columns
    segments: jax.Array  # int32 [B, T + N], 0 = padding
    running: jax.Array  # bool, some row goes on


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Two jitted functions: one reads the prompts, one goes on for TOGETHER tokens."""

    begin: Callable[[Params, jax.Array, jax.Array], Decoding]
    go_on: Callable[[Params, Decoding], Decoding]  # in the memory of the one it is given

    def __call__(
        self,
        params: Params,
        tokens: jax.Array | np.ndarray,
        segments: jax.Array | np.ndarray,
        tell: Callable[[int], None] = lambda _: None,
    ) -> jax.Array:
        """Answers to tokens [B, T]: int32 [B, N], up to and including the first end, then -1.

        tell: is called now and then with the tokens that each row has gone on by.
        """
        state, before = self.begin(params, tokens, segments), 0
        while state.running:
            state = self.go_on(params, state)
            tell(int(state.step) - before)
            before = int(state.step)
        return state.answer


def left_pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segments (0 = padding, 1 = prompt), both int32 [B, width]."""
    tokens = np.zeros((len(prompts), width), np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
        segments[row, width - len(ids) :] = 1
    return tokens, segments


def make_greedy(cfg: ModelConfig, *, dtype: Any, max_new_tokens: int, eos: Sequence[int]) -> Greedy:
    """Greedy decoding of at most N = `max_new_tokens`, each row up to the first of `eos`."""

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
    def begin(params: Params, tokens: jax.Array, segments: jax.Array) -> Decoding:
        kinds, _ = decoder.window_kinds(cfg)
        rows, width = tokens.shape
        shape = (cfg.num_layers, rows, width + max_new_tokens, cfg.num_kv_heads, cfg.head_dim)
        cache = tuple(
            jnp.zeros(shape, dtype, out_sharding=mesh.out(CACHE, shape)) for _ in range(2)
        )
        pad = width - jnp.sum(segments, axis=1)
        positions = jnp.maximum(jnp.arange(width)[None] - pad[:, None], 0)
        among_prompt = make_attention(segments, kinds, cfg.head_dim, dtype, documents=2)

        def see_prompt(kind: jax.Array, q: jax.Array, new: Cache, _: Cache) -> jax.Array:
            return among_prompt(kind, q, *new)

        h, cache = forward(params, tokens, positions, cache, 0, see_prompt)
        first = next_token(params, h)
        ahead = ((0, 0), (0, max_new_tokens))
        return Decoding(
            step=jnp.int32(0),
            token=first,
            done=jnp.zeros_like(first, bool),
            answer=jnp.pad(tokens[:, :0], ahead, constant_values=-1),
            cache=cache,
            # What will be generated belongs to the prompt's segment.
            segments=jnp.pad(segments, ahead, constant_values=1),
            running=jnp.array(max_new_tokens > 0),
        )

    def runs(state: Decoding) -> jax.Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def decode(params: Params, state: Decoding) -> Decoding:
        kinds, _ = decoder.window_kinds(cfg)
        eos_ids = jnp.asarray(list(eos) or [-1], jnp.int32)
        width = state.segments.shape[1] - max_new_tokens
        token = jnp.where(state.done, -1, state.token)
        answer = jax.lax.dynamic_update_slice(state.answer, token[:, None], (0, state.step))
        done = state.done | jnp.any(token[:, None] == eos_ids, axis=1)
        column = width + state.step
        masks = [causal_mask(state.segments, window, column, 1) for window in kinds]

        def see_cache(kind: jax.Array, q: jax.Array, _: Cache, cache: Cache) -> jax.Array:
            return attend(q, *cache, select_mask(kind, masks))

        pad = width - jnp.sum(state.segments[:, :width], axis=1)
        position = (column - pad)[:, None]
        h, cache = forward(
            params, jnp.maximum(token, 0)[:, None], position, state.cache, column, see_cache
        )
        return state.replace(
            step=state.step + 1,
            token=next_token(params, h),
            done=done,
            answer=answer,
            cache=cache,
        )

    @partial(jax.jit, donate_argnums=1)
    def go_on(params: Params, state: Decoding) -> Decoding:
        until = state.step + TOGETHER
        state = jax.lax.while_loop(
            lambda state: runs(state) & (state.step < until), partial(decode, params), state
        )
        return state.replace(running=runs(state))

    return Greedy(begin, go_on)


def generate(
    greedy: Greedy,
    params: Params,
    prompts: Sequence[Sequence[int]],
    batch: int,
    tell: Callable[[int], None] = lambda _: None,
) -> Iterator[list[int]]:
    """Answers to all prompts in order, as token ids without the padding; one compilation.

    tell: is called now and then with the tokens that were decoded since.
    """
    width = -(-max(map(len, prompts)) // 16) * 16
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        filled = part + [part[0]] * (batch - len(part))
        rows = mesh.rows_here(batch)
        tokens, segments = left_pad(filled, width)
        placed = mesh.shard_batch((tokens[rows], segments[rows]))
        answers = greedy(params, *placed, tell=lambda steps, rows=part: tell(steps * len(rows)))
        for row in processes.whole(answers)[: len(part)]:
            yield [int(t) for t in row if t >= 0]
