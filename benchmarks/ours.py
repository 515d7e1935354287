"""Our arms of steps.py: a step as the stages make it, float32 masters, bfloat16 compute."""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from arms import LR, ROW, VOCAB, kept, model_config, timed

from e3jax import config, mesh
from e3jax.data.batches import gather, prefetch
from e3jax.data.teacher import TeacherCache, open_cache
from e3jax.data.windows import Windows
from e3jax.distill import distill, losses
from e3jax.distill.freezing import frozen_layers, trained
from e3jax.job import to_batch
from e3jax.models import decoder
from e3jax.search import search
from e3jax.teaching import read_rows
from e3jax.training.optim import make_optimizer


@dataclasses.dataclass(frozen=True)
class Arm:
    """MICROBATCH:REMAT, and masksM, firstL, hidden, freeze, float8, cache, dataN, modelN where
    given."""

    micro: int = 8  # windows a forward pass
    remat: str = "layer"
    masks: int = 1  # a window
    first: int = 0  # no layer before this one is removed
    hidden: bool = False  # the layers' term
    freeze: bool = False  # distill.freeze
    float8: bool = False  # distill.float8
    cache: bool = False  # the teacher's top 10 from a cache on this disk, read ahead
    data: int = 1  # the mesh
    model: int = 1


def read_arm(text: str) -> Arm:
    """ "4:elementwise:masks4" as an Arm."""
    micro, remat, *more = text.split(":")
    names = {field.name for field in dataclasses.fields(Arm)}
    found = {"micro": int(micro), "remat": remat}
    for name in more:
        word = name if name in names else name.rstrip("0123456789")
        found[word] = int(name[len(word) :]) if word != name else True
    return Arm(**found)


def ours(options: argparse.Namespace, arm: Arm) -> dict:
    """First call, seconds, peak of a device, KL, and the share of the time that waited for data."""
    jax.config.update("jax_threefry_partitionable", True)
    dense = model_config(options.shapes, options.layers)
    rows = options.tokens // ROW // arm.masks
    devices = jax.devices()[: arm.data * arm.model]
    grid = mesh.make_mesh(data=arm.data, model=arm.model, devices=devices)
    with jax.set_mesh(grid), contextlib.ExitStack() as stack:
        make = search_arm if options.step == "search" else distil_arm
        take, state, inputs, figure = make(options, arm, dense, rows, stack)
        said, waited = {}, []

        def step():
            nonlocal state, said
            begun = time.perf_counter()
            arrays = next(inputs)
            waited.append(time.perf_counter() - begun)
            state, said = take(state, *arrays)

        def synchronise():
            jax.block_until_ready(said)

        first, seconds = timed(step, synchronise)
        found = {
            "first": first,
            "seconds": seconds,
            "peak": max(d.memory_stats()["peak_bytes_in_use"] for d in devices),
            "kl": float(said[figure]),
            "waited": sum(waited[-len(seconds) :]) / sum(seconds),
        }
        if options.profile:
            found["profile"] = profile(step, synchronise)
    return found


def search_arm(options, arm, dense, rows, stack):
    """(step, state, its other arguments, which metric is the loss)."""
    spec = config.Search(
        keep=len(kept(dense.num_layers)), steps=100, curriculum=0, batch=rows,
        masks_per_window=arm.masks, microbatch=min(arm.micro, rows),
        protect=tuple(range(arm.first)),
    )  # fmt: skip
    take = search.make_search_step(
        dense, spec, dtype=jnp.bfloat16, remat=arm.remat, chunk=options.chunk
    )
    params = decoder.init_params(jax.random.key(0), dense, jnp.bfloat16)
    state = mesh.replicate(search.init_state(jnp.zeros(dense.num_layers), spec, 0))
    batch = whole_batch(random_windows(rows, options.documents), rows)
    return take, state, itertools.repeat((params, batch)), "loss"


def distil_arm(options, arm, dense, rows, stack):
    """The same; a cached teacher's parameters are not there when the step is measured."""
    keep = kept(dense.num_layers, arm.first)
    frozen = frozen_layers(keep) if arm.freeze else 0
    recipe = config.Distill(
        steps=100, batch=rows, microbatch=min(arm.micro, rows), chunk=options.chunk,
        optimizer=config.Optimizer(lr=LR), teacher="cache" if arm.cache else "online",
        hidden=30.0 * arm.hidden, float8=arm.float8,
    )  # fmt: skip
    student = dense.take_layers(keep)
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    take = distill.make_train_step(
        student,
        recipe,
        optimizer,
        teacher_cfg=dense,
        keep=keep,
        frozen=frozen,
        dtype=jnp.bfloat16,
        remat=arm.remat,
    )
    params = decoder.init_params(jax.random.key(0), dense, jnp.bfloat16)
    start = decoder.take_layers(params, dense, keep)
    if arm.cache:
        del params
        state = distill.init_state(start, optimizer, 11.0)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        windows = random_windows(4 * rows, options.documents)
        return take, state, stored_batches(windows, rows, recipe.top_k, folder, stack), "kl"
    windows = random_windows(rows, options.documents)
    check_ours(start, student, params, dense, whole_batch(windows, arm.data, time=256))
    state = distill.init_state(trained(start, student, frozen), optimizer, 11.0)
    return take, state, itertools.repeat((params, whole_batch(windows, rows), None)), "kl"


def random_windows(rows: int, documents: int) -> Windows:
    rng = np.random.default_rng(0)
    segments = 1 + np.sort(rng.integers(0, documents, (rows, ROW)), axis=1)
    tokens = rng.integers(0, VOCAB, (rows, ROW), dtype=np.int32)
    return Windows(tokens, segments.astype(np.int32), np.ones((rows, ROW), bool), {}, "random")


def whole_batch(windows, rows, time=ROW):
    """The first tokens of the first rows."""
    batch = to_batch(gather(windows, np.arange(rows)), windows)
    return mesh.shard_batch(jax.tree.map(lambda x: x[:, :time], batch))


def stored_batches(windows, rows, k, folder, stack):
    """A step's arguments without a teacher's parameters: batches, and a random teacher's top k read
    from a cache in `folder`, ahead of the step as a stage does, while `stack` is open."""
    rng, facts = np.random.default_rng(1), (windows, k, 1.0, "random")
    cache = TeacherCache.create(folder, *facts)
    for index in np.arange(len(windows)).reshape(-1, rows):
        z = -np.sort(-rng.normal(size=(rows, ROW, k)), axis=-1)
        logp = z - np.logaddexp.reduce(z, axis=-1, keepdims=True) - 0.1
        ids = rng.integers(0, VOCAB - k, (rows, ROW, 1)) + np.arange(k)
        cache.write(index, ids, logp, np.full((rows, ROW), 2.0), np.full((rows, ROW), 9.0))
    cache.finish(windows)
    cache = open_cache(folder, *facts)

    def read(step: int):
        arrays = gather(windows, (step * rows + np.arange(rows)) % len(windows))
        return to_batch(arrays, windows), read_rows(cache, arrays["index"])

    ahead = stack.enter_context(contextlib.closing(prefetch(read, 0, 1000)))
    return ((None, *mesh.shard_batch(arrays)) for _, arrays in ahead)


def check_ours(student, cfg, teacher, dense, few) -> None:
    """The KL of a few tokens in bfloat16 is that in float32 by the textbook, within 2 %."""

    @jax.jit
    def both(student, teacher, few):
        h_q = decoder.hidden(student, few, cfg, dtype=jnp.bfloat16, remat="none")
        h_p = decoder.hidden(teacher, few, dense, dtype=jnp.bfloat16, remat="none")
        heads = decoder.head(student, cfg), decoder.head(teacher, dense)
        known, objective = losses.Online(h_p, heads[1]), losses.Objective(chunk=100)
        _, sums = losses.token_sums(h_q, heads[0], few.targets, few.mask, known, objective)
        h_q = decoder.hidden(student, few, cfg, dtype=jnp.float32, remat="none")
        h_p = decoder.hidden(teacher, few, dense, dtype=jnp.float32, remat="none")
        q = jax.nn.log_softmax(decoder.logits(student, h_q, cfg))
        p = jax.nn.log_softmax(decoder.logits(teacher, h_p, dense))
        kl = jnp.sum(jnp.exp(p) * (p - q), -1)
        return jnp.sum(sums.kl), jnp.sum(jnp.where(few.mask, kl, 0))

    found, wanted = map(float, both(student, teacher, few))
    np.testing.assert_allclose(found, wanted, rtol=0.02)


def profile(step, synchronise) -> str:
    """Where the time of two steps goes, by kernel: milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
            step()
            synchronise()
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
    spent, count = collections.Counter(), collections.Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                spent[event.name] += event.duration_ns / 2e6
                count[event.name] += 1
    total = sum(spent.values())
    lines = [f"    {total:9.1f} ms a step in all kernels"]
    for name, ms in spent.most_common(45):
        lines.append(f"    {ms:9.1f} ms {ms / total:6.1%} {count[name] // 2:6d} x  {name[:110]}")
    return "\n".join(lines) + "\n"
