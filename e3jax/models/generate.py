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
from e3jax.models.attention import attend_by_head, causal_mask, make_attention, select_mask
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params

Cache = tuple[jax.Array, ...]  # keys, and values unless they are a part of them; see `cache_order`
TOGETHER = 128  # tokens a row that one call decodes; in between the host can speak and stop


@flax.struct.dataclass
class Decoding:
    """B rows in the midst of their answers; N is the longest answer, T the prompts' width."""

    step: jax.Array  # int32, tokens of the answers so far
    token: jax.Array  # int32 [B], the next one
    done: jax.Array  # bool [B], an end-of-sequence token is in the answer
    answer: jax.Array  # int32 [B, N], -1 beyond the answer
    cache: Any  # a list of Caches of S = T + N columns: one a layer, or one [L, ...] a run of them
    segments: jax.Array  # int32 [B, T + N], 0 = padding
    running: jax.Array  # bool, some row goes on


@dataclasses.dataclass(frozen=True)
class Greedy:
    """What makes of parameters the weights of two jitted functions: one reads the prompts, one goes
    on for TOGETHER tokens."""

    prepare: Callable[[Params], Params]
    begin: Callable[[Params, jax.Array, jax.Array], Decoding]
    go_on: Callable[[Params, Decoding], Decoding]  # in the memory of the one it is given

    def __call__(
        self,
        weights: Params,
        tokens: jax.Array | np.ndarray,
        segments: jax.Array | np.ndarray,
        tell: Callable[[int], None] = lambda _: None,
    ) -> jax.Array:
        """Answers to tokens [B, T]: int32 [B, N], up to and including the first end, then -1.

        tell: is called now and then with the tokens that each row has gone on by.
        """
        state, before = self.begin(weights, tokens, segments), 0
        while state.running:
            state = self.go_on(weights, state)
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
    kinds, kind_of = decoder.window_kinds(cfg)
    ropes, rope_of = decoder.rope_kinds(cfg)
    width_of_key = cfg.head_dim if cfg.latent is None else cfg.latent.kv_rank + cfg.latent.rope_dim
    apply = partial(decoder.layer, cfg=cfg, absorbed=True)

    def stored(k: jax.Array, v: jax.Array) -> Cache:
        return (k, v) if cfg.latent is None else (k,)

    def values(cache: Sequence[jax.Array]) -> jax.Array:
        return cache[1] if cfg.latent is None else cache[0][..., : cfg.latent.kv_rank]

    def each(kinds: Any) -> Any:
        """An entry a layer, where there are none too."""
        return [None] * cfg.num_layers if kinds is None else kinds

    def next_token(weights: Params, h_btd: jax.Array) -> jax.Array:
        h = decoder.last_norm(weights, h_btd[:, -1:], cfg)
        scores = decoder.logits(weights, h, cfg)[:, 0]
        if mesh.current() is not None:  # argmax needs the whole vocabulary
            scores = jax.sharding.reshard(scores, mesh.spec(("batch", None)))
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    @jax.jit
    def begin(weights: Params, tokens: jax.Array, segments: jax.Array) -> Decoding:
        width, order = tokens.shape[1], cache_order(len(tokens))
        pad = width - jnp.sum(segments, axis=1)
        positions = jnp.maximum(jnp.arange(width)[None] - pad[:, None], 0)
        angles = rope.make_angles(positions, ropes, cfg.rope_dim)
        among_prompt = make_attention(
            segments,
            kinds,
            width_of_key,
            dtype,
            documents=2,
            cap=cfg.attention_cap,
            sinks=cfg.sinks,
        )
        ahead = ((0, 0), (0, max_new_tokens))

        def one(h: jax.Array, xs: tuple) -> tuple[jax.Array, Cache]:
            w, kind, turn = xs
            found: Cache | None = None

            def see(q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array) -> jax.Array:
                nonlocal found
                longer = [(0, max_new_tokens if axis == 1 else 0) for axis in order]
                found = tuple(jnp.pad(x.transpose(order), longer) for x in stored(k, v))
                return among_prompt(kind, q, k, v, *sinks)

            h = apply(w, h, angles(turn), see)
            assert found is not None
            return h, found

        h, cache = decoder.first_stream(weights, tokens, cfg, dtype), []
        if is_apart(weights):
            for xs in zip(weights["layers"], kind_of, each(rope_of), strict=True):
                h, found = one(h, xs)
                cache.append(found)
        else:
            for run in cfg.runs:
                h, found = jax.lax.scan(one, h, decoder.of_run((weights, kind_of, rope_of), run))
                cache.append(found)
        first = next_token(weights, h)
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

    def decode(weights: Params, state: Decoding) -> Decoding:
        eos_ids = jnp.asarray(list(eos) or [-1], jnp.int32)
        width = state.segments.shape[1] - max_new_tokens
        order = cache_order(len(state.token))
        token = jnp.where(state.done, -1, state.token)
        answer = jax.lax.dynamic_update_slice(state.answer, token[:, None], (0, state.step))
        done = state.done | jnp.any(token[:, None] == eos_ids, axis=1)
        column = width + state.step
        masks = [causal_mask(state.segments, window, column, 1) for window in kinds]
        pad = width - jnp.sum(state.segments[:, :width], axis=1)
        angles = rope.make_angles((column - pad)[:, None], ropes, cfg.rope_dim)

        def one(h: jax.Array, of_layer: tuple, cache: Any, layer: tuple) -> tuple:
            """A layer on the new tokens; theirs go to `column` of its cache, or of what is stacked
            at `layer`."""
            w, kind, turn = of_layer

            def see(q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array) -> jax.Array:
                nonlocal cache
                at = (*layer, *(column if axis == 1 else 0 for axis in order))
                stacked = (None,) * len(layer)
                cache = tuple(
                    jax.lax.dynamic_update_slice(old, new.transpose(order)[stacked], at)
                    for old, new in zip(cache, stored(k, v), strict=True)
                )
                seen = cache if not layer else (stack[layer[0]] for stack in cache)
                seen = [_by_head(x, order) for x in seen]
                mask = select_mask(kind, masks)
                return attend_by_head(q, seen[0], values(seen), mask, cfg.attention_cap, *sinks)

            h = apply(w, h, angles(turn), see)
            return h, cache

        def body(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            of_layer, index = xs
            return one(carry[0], of_layer, carry[1], (index,)), None

        h, cache = decoder.first_stream(weights, jnp.maximum(token, 0)[:, None], cfg, dtype), []
        if is_apart(weights):
            layers = zip(weights["layers"], kind_of, each(rope_of), strict=True)
            for of_layer, old in zip(layers, state.cache, strict=True):
                h, new = one(h, of_layer, old, ())
                cache.append(new)
        else:
            for run, old in zip(cfg.runs, state.cache, strict=True):
                xs = decoder.of_run((weights, kind_of, rope_of), run), jnp.arange(run.count)
                (h, new), _ = jax.lax.scan(body, (h, old), xs)
                cache.append(new)
        return state.replace(
            step=state.step + 1,
            token=next_token(weights, h),
            done=done,
            answer=answer,
            cache=cache,
        )

    @partial(jax.jit, donate_argnums=1)
    def go_on(weights: Params, state: Decoding) -> Decoding:
        until = state.step + TOGETHER
        state = jax.lax.while_loop(
            lambda state: runs(state) & (state.step < until), partial(decode, weights), state
        )
        return state.replace(running=runs(state))

    return Greedy(partial(prepare, cfg=cfg, dtype=dtype), begin, go_on)


def is_apart(weights: Params) -> bool:
    """Whether `prepare` took the layers out of their stacks."""
    return isinstance(weights.get("layers"), tuple)


def prepare(params: Params, *, cfg: ModelConfig, dtype: Any) -> Params:
    """The parameters as decoding reads them for every token: in `dtype`, all but norms and routers;
    on GPUs that have whole weights with a tuple of layers, a second copy of them, for of a stack
    each layer's would be copied out for each token. (Sharded over `data` and apart, XLA would
    gather all before the first token.) What need not change is not copied. Abstract parameters give
    abstract weights.
    """
    if is_apart(params):
        return params
    set_mesh = mesh.current()
    apart = mesh.platform() == "gpu" and (set_mesh is None or set_mesh.shape["data"] == 1)

    def cast(path: tuple, w: Any) -> Any:
        as_it_is = w.dtype == dtype or stays_wide(path[-1].key)
        return w if as_it_is else _made(_cast, w, dtype)

    if apart:
        rest = {name: w for name, w in params.items() if name not in cfg.stacks}
        stacks = {name: _made(_take_apart, params[name], dtype) for name in cfg.stacks}
        layers: dict[int, Params] = {}
        for name, ids in cfg.stacks.items():
            layers |= zip(ids, stacks[name], strict=True)
        rest = jax.tree_util.tree_map_with_path(cast, rest)
        return rest | {"layers": tuple(layers[i] for i in range(cfg.num_layers))}
    return jax.tree_util.tree_map_with_path(cast, params)


def stays_wide(name: str) -> bool:
    """Whether a parameter is used in float32 alone: norms, and what chooses experts."""
    return name.endswith(("norm", "norm_bias")) or name.startswith("router")


def _made(fn: Callable[..., Any], tree: Any, dtype: Any) -> Any:
    if isinstance(jax.tree.leaves(tree)[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(partial(fn, dtype=dtype), tree)
    return fn(tree, dtype=dtype)


@partial(jax.jit, static_argnames="dtype")
def _cast(w: jax.Array, dtype: Any) -> jax.Array:
    return w.astype(dtype)


@partial(jax.jit, static_argnames="dtype")
def _take_apart(layers: Params, dtype: Any) -> tuple[Params, ...]:
    count = len(jax.tree.leaves(layers)[0])
    typed = {name: w if stays_wide(name) else w.astype(dtype) for name, w in layers.items()}
    return tuple({name: w[i] for name, w in typed.items()} for i in range(count))


def cache_order(rows: int) -> tuple[int, ...]:
    """The axes of keys or values [B, T, K, H] in the order in which a cache of `rows` has them.

    By head, as attention reads them; on a TPU that has several rows by time, since its compiler
    would copy the whole cache into that order and back.
    """
    set_mesh = mesh.current()
    several = set_mesh is not None and rows > mesh.axis_size(set_mesh, mesh.BATCH)
    return (1, 2, 0, 3) if several and mesh.platform() == "tpu" else (0, 2, 1, 3)


def _by_head(cache: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """-> [B, K, S, H]."""
    return cache.transpose([order.index(axis) for axis in (0, 2, 1, 3)])


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
    weights = greedy.prepare(params)
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        filled = part + [part[0]] * (batch - len(part))
        rows = mesh.rows_here(batch)
        tokens, segments = left_pad(filled, width)
        placed = mesh.shard_batch((tokens[rows], segments[rows]))
        answers = greedy(weights, *placed, tell=lambda steps, rows=part: tell(steps * len(rows)))
        for row in processes.whole(answers)[: len(part)]:
            yield [int(t) for t in row if t >= 0]
