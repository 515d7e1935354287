"""Autoregressive generation with a key-value cache: B slots, each with an answer of its own.

The cache is a ring of S columns, and all slots write the same one at each step, whatever their
lengths: a prompt that takes a slot over is put in the columns before the current one, and a slot
sees what is not older than its own text. So a step costs what it would if all rows had begun
together, and none waits for another. serve.py has the queue.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import devices, mesh
from e3jax.models import decoder, rope, sample
from e3jax.models.attention import attend_by_head, make_attention, select_mask
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.sample import Sampling

Cache = tuple[jax.Array, ...]  # keys, and values unless they are a part of them; see `cache_order`
TOGETHER = 128  # tokens a row that one call decodes at most; in between the host speaks


@flax.struct.dataclass
class Asking:
    """What is drawn, of slots that do not all want the most likely token."""

    sampling: Sampling
    seen: jax.Array  # bool [B, V], the tokens of prompt and answer


@flax.struct.dataclass
class Slots:
    """B answers in the making."""

    column: jax.Array  # int32, of the ring: where the next keys and values go
    token: jax.Array  # int32 [B], the next one of the answer
    position: jax.Array  # int32 [B], its position in the row
    count: jax.Array  # int32 [B], tokens of the answer before it
    left: jax.Array  # int32 [B], tokens that the answer may still have; 0: the slot is free
    cache: Any  # a list of Caches of S columns: one a layer, or one [L, ...] a run of them
    asking: Asking | None  # None: the most likely token for all


@flax.struct.dataclass
class Arrival:
    """R prompts of at most T tokens and the slots that some or all of them take over."""

    tokens: jax.Array  # int32 [R, T], padded on the left
    segments: jax.Array  # int32 [R, T], 0 = padding, 1 = prompt
    source: jax.Array  # int32 [B], the row whose prompt the slot takes; -1: it goes on
    left: jax.Array  # int32 [B], the most tokens of an answer; 0 where the slot goes on
    sampling: Sampling | None  # of every slot


@dataclasses.dataclass(frozen=True)
class Generator:
    """What makes of parameters the weights of jitted functions, and these. `admit` and `go_on` work
    in the memory of the slots that they are given."""

    eos: frozenset[int]
    prepare: Callable[[Params], Params]
    empty: Callable[..., Slots]  # (weights, rows=B, columns=S, sampled=bool)
    admit: Callable[[Params, Slots, Arrival], Slots]
    # (weights, slots, alive, enough, steps): at most `steps` <= TOGETHER tokens for each slot,
    # until `enough` slots are free; those not `alive` (bool [B]) end here. Also the new tokens of
    # each, int32 [B, TOGETHER], -1 beyond them.
    go_on: Callable[..., tuple[Slots, jax.Array]]


def make_generator(cfg: ModelConfig, *, dtype: Any, eos: Sequence[int]) -> Generator:
    """Generation of answers that end with the first of `eos`, or where they may not be longer."""
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

    @partial(jax.jit, static_argnames=("rows", "columns", "sampled"))
    def empty(weights: Params, *, rows: int, columns: int, sampled: bool) -> Slots:
        order = cache_order(rows)
        heads = cfg.num_kv_heads if cfg.latent is None else 1
        shape = (rows, columns, heads, width_of_key)
        # Latent vectors are of no head.
        axes = ("batch", None, "heads" if cfg.latent is None else None, None)

        def part(*stack: int) -> Cache:
            ordered = [axes[a] for a in order], [shape[a] for a in order]
            names, sizes = (None,) * len(stack) + tuple(ordered[0]), (*stack, *ordered[1])
            return stored(*(mesh.place(jnp.zeros(sizes, dtype), names) for _ in range(2)))

        def of_rows(fill: Any, dtype: Any = jnp.int32) -> jax.Array:
            return mesh.place(jnp.full(rows, fill, dtype), ("batch",))

        zeros = of_rows(0)
        asking = None
        if sampled:
            ones = of_rows(1, jnp.float32)
            asking = Asking(
                Sampling(
                    temperature=0 * ones,
                    top_k=zeros,
                    top_p=ones,
                    min_p=0 * ones,
                    repetition_penalty=ones,
                    seed=of_rows(0, jnp.uint32),
                ),
                mesh.place(jnp.zeros((rows, cfg.vocab_size), bool), ("batch", None)),
            )
        apart = is_apart(weights)
        cache = (
            [part() for _ in range(cfg.num_layers)] if apart else [part(r.count) for r in cfg.runs]
        )
        return Slots(jnp.int32(0), zeros, zeros, zeros, zeros, cache, asking)

    def chosen(weights: Params, h_btd: jax.Array) -> jax.Array:
        """The logits after each row's last token, whole: argmax and draws need all of them."""
        h = decoder.last_norm(weights, h_btd[:, -1:], cfg)
        return mesh.place(decoder.logits(weights, h, cfg)[:, 0], ("batch", None))

    def pick(logits_bv: jax.Array, asking: Asking | None, count_b: jax.Array) -> jax.Array:
        if asking is None:
            return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
        return sample.next_token(logits_bv, asking.sampling, asking.seen, count_b)

    @partial(jax.jit, donate_argnums=1)
    def admit(weights: Params, slots: Slots, new: Arrival) -> Slots:
        rows, width = new.tokens.shape
        order = cache_order(len(slots.token))
        lengths = jnp.sum(new.segments, axis=1)
        positions = jnp.maximum(jnp.arange(width)[None] - (width - lengths)[:, None], 0)
        angles = rope.make_angles(positions, ropes, cfg.rope_dim)
        among_prompt = make_attention(
            new.segments,
            kinds,
            width_of_key,
            dtype,
            documents=2,
            cap=cfg.attention_cap,
            sinks=cfg.sinks,
        )

        def one(h: jax.Array, xs: tuple) -> tuple[jax.Array, Cache]:
            w, kind, turn = xs
            found: Cache | None = None

            def see(q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array) -> jax.Array:
                nonlocal found
                found = tuple(x.transpose(order) for x in stored(k, v))
                return among_prompt(kind, q, k, v, *sinks)

            h = apply(w, h, angles(turn), see)
            assert found is not None
            return h, found

        h, found = decoder.first_stream(weights, new.tokens, cfg, dtype), []
        if is_apart(weights):
            for xs in zip(weights["layers"], kind_of, each(rope_of), strict=True):
                h, of_layer = one(h, xs)
                found.append(of_layer)
        else:
            for run in cfg.runs:
                h, of_run = jax.lax.scan(one, h, decoder.of_run((weights, kind_of, rope_of), run))
                found.append(of_run)

        taken = new.source >= 0

        def given(x: jax.Array, old: jax.Array, axis: int = 0) -> jax.Array:
            """`old` with the rows of `x` in the slots that take them."""
            theirs = mesh.take_rows(x, jnp.maximum(new.source, 0), axis)
            shape = [-1 if a == axis else 1 for a in range(x.ndim)]
            return jnp.where(taken.reshape(shape), theirs, old)

        def put(old: jax.Array, x: jax.Array) -> jax.Array:
            """Keys or values in the columns before the current one."""
            layers = old.ndim - len(order)
            time, size = layers + order.index(1), old.shape[layers + order.index(1)]
            length = min(width, size)
            x = jax.lax.slice_in_dim(x, width - length, width, axis=time)
            columns = (slots.column - length + jnp.arange(length)) % size
            at = (*(slice(None) for _ in range(time)), columns)
            return old.at[at].set(given(x, old[at], layers + order.index(0)))

        asking = slots.asking
        if asking is not None:
            assert new.sampling is not None
            seen = mesh.place(jnp.zeros((rows, cfg.vocab_size), bool), ("batch", None))
            mark = jax.vmap(lambda of_row, ids, real: of_row.at[ids].max(real))
            seen = mark(seen, new.tokens, new.segments > 0)
            asking = Asking(new.sampling, given(seen, asking.seen))
        count = jnp.where(taken, 0, slots.count)
        logits = chosen(weights, h)
        logits = mesh.take_rows(logits, jnp.maximum(new.source, 0), 0)
        return slots.replace(
            token=jnp.where(taken, pick(logits, asking, count), slots.token),
            position=given(lengths, slots.position),
            count=count,
            left=jnp.where(taken, new.left, slots.left),
            cache=jax.tree.map(put, slots.cache, found),
            asking=asking,
        )

    def decode(weights: Params, slots: Slots) -> Slots:
        """Every slot's token is read, and the one after it chosen."""
        eos_ids = jnp.asarray(list(eos) or [-1], jnp.int32)
        order = cache_order(len(slots.token))
        oldest = jax.tree.leaves(slots.cache)[0]
        size = oldest.shape[oldest.ndim - len(order) + order.index(1)]
        age = (slots.column - jnp.arange(size)) % size
        own = age <= slots.position[:, None]
        masks = [(own if window is None else own & (age < window))[:, None] for window in kinds]
        angles = rope.make_angles(slots.position[:, None], ropes, cfg.rope_dim)

        def one(h: jax.Array, of_layer: tuple, cache: Any, layer: tuple) -> tuple:
            """A layer on the new tokens; theirs go to the current column of its cache, or of what
            is stacked at `layer`."""
            w, kind, turn = of_layer

            def see(q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array) -> jax.Array:
                nonlocal cache
                at = (*layer, *(slots.column if axis == 1 else 0 for axis in order))
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

        h, cache = decoder.first_stream(weights, slots.token[:, None], cfg, dtype), []
        if is_apart(weights):
            layers = zip(weights["layers"], kind_of, each(rope_of), strict=True)
            for of_layer, old in zip(layers, slots.cache, strict=True):
                h, new = one(h, of_layer, old, ())
                cache.append(new)
        else:
            for run, old in zip(cfg.runs, slots.cache, strict=True):
                xs = decoder.of_run((weights, kind_of, rope_of), run), jnp.arange(run.count)
                (h, new), _ = jax.lax.scan(body, (h, old), xs)
                cache.append(new)
        ended = jnp.any(slots.token[:, None] == eos_ids, axis=1)
        busy = (slots.left > 0).astype(jnp.int32)
        asking = slots.asking
        if asking is not None:
            said = jnp.arange(cfg.vocab_size) == slots.token[:, None]
            asking = asking.replace(seen=asking.seen | said)
        count = slots.count + busy
        return Slots(
            column=(slots.column + 1) % size,
            token=pick(chosen(weights, h), asking, count),
            position=slots.position + busy,
            count=count,
            left=jnp.where(ended, 0, slots.left - busy),
            cache=cache,
            asking=asking,
        )

    @partial(jax.jit, donate_argnums=1)
    def go_on(
        weights: Params, slots: Slots, alive: jax.Array, enough: jax.Array, steps: jax.Array
    ) -> tuple[Slots, jax.Array]:
        rows = len(slots.token)
        none = mesh.place(jnp.full((rows, TOGETHER), -1, jnp.int32), ("batch", None))

        def runs(state: tuple[jax.Array, Slots, jax.Array]) -> jax.Array:
            step, slots, _ = state
            return (step < steps) & (jnp.sum(slots.left == 0) < enough)

        def body(
            state: tuple[jax.Array, Slots, jax.Array],
        ) -> tuple[jax.Array, Slots, jax.Array]:
            step, slots, said = state
            token = jnp.where(slots.left > 0, slots.token, -1)
            said = jax.lax.dynamic_update_slice(said, token[:, None], (0, step))
            return step + 1, decode(weights, slots), said

        slots = slots.replace(left=jnp.where(alive, slots.left, 0))
        _, slots, said = jax.lax.while_loop(runs, body, (jnp.int32(0), slots, none))
        return slots, said

    return Generator(frozenset(eos), partial(prepare, cfg=cfg, dtype=dtype), empty, admit, go_on)


def abstract_arguments(
    generator: Generator, weights: Params, rows: int, columns: int, *, sampled: bool = False
) -> tuple:
    """ShapeDtypeStructs of what `go_on` is given, for the most likely tokens or for drawn ones."""
    slots = jax.eval_shape(
        partial(generator.empty, rows=rows, columns=columns, sampled=sampled), weights
    )
    alive = jax.ShapeDtypeStruct((rows,), bool, sharding=mesh.sharding(("batch",)))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return weights, slots, alive, number, number


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
    apart = devices.platform() == "gpu" and (set_mesh is None or set_mesh.shape["data"] == 1)

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
    return (1, 2, 0, 3) if several and devices.platform() == "tpu" else (0, 2, 1, 3)


def _by_head(cache: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """-> [B, K, S, H]."""
    return cache.transpose([order.index(axis) for axis in (0, 2, 1, 3)])
