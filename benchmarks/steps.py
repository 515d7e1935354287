"""Search and distillation steps on one GPU, ours and the best of PyTorch's in one run.

    python benchmarks/steps.py distil --shapes 1.7b --tokens 32768
    python benchmarks/steps.py search --shapes 1.7b --tokens 16384

The models have Qwen3's shapes and random weights, the rows 4096 random tokens, the student three
quarters of the layers. Each arm runs in a process of its own without preallocation; its memory is
the greatest that its allocator had in use. An arm's KL is compared with one in float32 before it is
timed. Share: of a bfloat16 product of 8192 x 8192 matrices in the same run, with the operations a
model needs, none that is repeated: one forward pass is 1, causal attention a half of the square; a
distillation is the teacher's pass and three of the student's, a search three of the dense model's,
of which one is shared by M rows where M masks are drawn for a window (`masksM`).
PyTorch arms need torch and transformers, those with Liger liger-kernel; ours need JAX for CUDA.
"""

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import sys
import tempfile
import time

from arms import LR, ROW, SHAPES, VOCAB, give, kept, middle, model_config, run_arm, timed


def main() -> None:
    options = parse()
    if options.arm is not None:  # in its own process
        return give(measure(options))
    arguments = sys.argv[1:]
    rate = run_arm(__file__, arguments, "matmul")["rate"]
    print(f"bfloat16 8192^3: {rate / 1e12:.0f} TFLOP/s", flush=True)
    heads = f"{'arm':<44}{'tokens/s':>10}{'spread':>9}{'share':>8}{'GiB':>7}{'first s':>9}"
    print(f"{heads}{'KL':>9}{'waited':>8}")
    for arm in options.arms or ARMS[options.step]:
        found = run_arm(__file__, arguments, arm)
        if "error" in found:
            print(f"{arm:<44}  {found['error']}", flush=True)
            continue
        median, spread = middle(found["seconds"])
        share = options.tokens * flops_per_token(options, arm) / median / rate
        print(
            f"{arm:<44}{options.tokens / median:>10,.0f}{spread:>9.1%}{share:>8.3f}"
            f"{found['peak'] / 2**30:>7.1f}{found['first']:>9.0f}{found['kl']:>9.4f}"
            f"{found.get('waited', 0):>8.1%}",
            flush=True,
        )
        print(found.get("profile", ""), end="", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("distil", "search"))
    parser.add_argument("--shapes", choices=SHAPES, default="1.7b")
    parser.add_argument("--layers", type=int, help="of the dense model, instead of its own")
    parser.add_argument("--tokens", type=int, default=32_768, help="a step")
    parser.add_argument("--arms", nargs="+", help="ours: e3jax:MICROBATCH:REMAT[:masksM][:cache]")
    parser.add_argument("--documents", type=int, default=1, help="in each of our rows")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens whose logits exist")
    parser.add_argument("--profile", action="store_true", help="ours: where a step's time goes")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for arm in options.arms or ():
        if options.tokens % (ROW * masks(arm.split(":"))):
            parser.error(f"--tokens: {arm} needs a multiple of {ROW * masks(arm.split(':'))}")
    return options


def measure(options: argparse.Namespace) -> dict:
    """The outcome of one arm, in this process."""
    name, *details = options.arm.split(":")
    if name == "matmul":
        return {"rate": matmul_rate()}
    if name == "torch":
        from peer import peer

        return peer(options, *details, masks=masks(details))
    return ours(options, *details)


def masks(details) -> int:
    """Masks a window in a search."""
    return next((int(d[len("masks") :]) for d in details if d.startswith("masks")), 1)


def flops_per_token(options: argparse.Namespace, arm: str) -> float:
    from e3jax.planning import cost

    def forward(cfg):
        return cost.body_flops(cfg, ROW) + cost.head_flops(cfg)

    dense = model_config(options.shapes, options.layers)
    if options.step == "search":
        return (2 + 1 / masks(arm.split(":"))) * forward(dense)
    taught = 0 if arm.endswith("cache") else forward(dense)
    return taught + 3 * forward(dense.take_layers(kept(dense.num_layers)))


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 product of random 8192 x 8192 matrices."""
    import jax
    import jax.numpy as jnp

    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)

    @jax.jit
    def product(a, b):  # ten of them, so that starting one is nothing
        return jax.lax.fori_loop(0, 10, lambda _, x: (x @ b * 0.01).astype(x.dtype), a)

    _, seconds = timed(lambda: product(a, b).block_until_ready(), lambda: None)
    return 10 * 2 * 8192**3 / statistics.median(seconds)


# ---------------------------------------------------------------- e3jax


def ours(options: argparse.Namespace, micro: str = "8", remat: str = "layer", *more: str) -> dict:
    """A step as the stages make it: float32 masters and moments, bfloat16 compute.

    more: masksM, or cache: the teacher's top 10 from a cache on this disk, read ahead.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from e3jax import mesh
    from e3jax.data.windows import Windows
    from e3jax.models import decoder

    jax.config.update("jax_threefry_partitionable", True)
    dense = model_config(options.shapes, options.layers)
    rows = options.tokens // ROW // masks(more)
    rng = np.random.default_rng(0)
    shape = (rows * (4 if "cache" in more else 1), ROW)
    segments = 1 + np.sort(rng.integers(0, options.documents, shape), axis=1)
    tokens = rng.integers(0, VOCAB, shape, dtype=np.int32)
    windows = Windows(tokens, segments.astype(np.int32), np.ones(shape, bool), {}, "random")
    with jax.set_mesh(mesh.make_mesh()), contextlib.ExitStack() as stack:
        params = decoder.init_params(jax.random.key(0), dense, jnp.bfloat16)
        make = search_arm if options.step == "search" else distil_arm
        take, state, inputs, figure = make(
            options, dense, params, windows, rows, int(micro), remat, more, stack
        )
        del params  # a cached teacher's are not there
        said, waited = {}, []

        def step():
            nonlocal state, said
            begun = time.perf_counter()
            arrays = next(inputs)
            waited.append(time.perf_counter() - begun)
            state, said = take(state, *arrays)

        first, seconds = timed(step, lambda: jax.block_until_ready(said))
        found = {
            "first": first,
            "seconds": seconds,
            "peak": jax.local_devices()[0].memory_stats()["peak_bytes_in_use"],
            "kl": float(said[figure]),
            "waited": sum(waited[-len(seconds) :]) / sum(seconds),
        }
        if options.profile:
            found["profile"] = profile(step, lambda: jax.block_until_ready(said))
    return found


def search_arm(options, dense, params, windows, rows, micro, remat, more, stack):
    """(step, state, its other arguments, which metric is the loss)."""
    import jax.numpy as jnp

    from e3jax import config, mesh
    from e3jax.search import search

    spec = config.Search(
        keep=len(kept(dense.num_layers)), steps=100, batch=rows, masks_per_window=masks(more),
        microbatch=min(micro, rows),
    )  # fmt: skip
    take = search.make_search_step(
        dense, spec, seed=0, dtype=jnp.bfloat16, remat=remat, chunk=options.chunk
    )
    state = mesh.replicate(search.init_state(jnp.zeros(dense.num_layers), spec))
    return take, state, itertools.repeat((params, whole_batch(windows, rows))), "loss"


def distil_arm(options, dense, params, windows, rows, micro, remat, more, stack):
    import jax.numpy as jnp

    from e3jax import config
    from e3jax.distill import distill
    from e3jax.models import decoder
    from e3jax.training.optim import make_optimizer

    keep = kept(dense.num_layers)
    recipe = config.Distill(
        steps=100, batch=rows, microbatch=min(micro, rows), chunk=options.chunk,
        optimizer=config.Optimizer(lr=LR), teacher="cache" if "cache" in more else "online",
    )  # fmt: skip
    student = dense.take_layers(keep)
    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    take = distill.make_train_step(
        student, recipe, optimizer, teacher_cfg=dense, dtype=jnp.bfloat16, remat=remat
    )
    start = decoder.take_layers(params, keep)
    state = distill.init_state(start, optimizer, 11.0)
    if "cache" in more:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        return take, state, stored_batches(windows, rows, recipe.top_k, folder), "kl"
    batch = whole_batch(windows, rows)
    check_ours(start, student, params, dense, batch)
    return take, state, itertools.repeat((params, batch, None)), "kl"


def whole_batch(windows, rows):
    import numpy as np

    from e3jax import mesh
    from e3jax.data.batches import gather
    from e3jax.job import to_batch

    return mesh.shard_batch(to_batch(gather(windows, np.arange(rows)), windows))


def stored_batches(windows, rows, k, folder):
    """A step's arguments without a teacher's parameters: batches, and a random teacher's top k read
    from a cache in `folder`, ahead of the step as a stage does."""
    import numpy as np

    from e3jax import mesh
    from e3jax.data.batches import gather, prefetch
    from e3jax.data.teacher import TeacherCache, open_cache
    from e3jax.job import to_batch
    from e3jax.teaching import read_rows

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

    return ((None, *mesh.shard_batch(arrays)) for _, arrays in prefetch(read, 0, 1000))


def check_ours(student, cfg, teacher, dense, batch) -> None:
    """The KL of 256 tokens in bfloat16 is that in float32 by the textbook, within 2 %."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from e3jax.distill import losses
    from e3jax.models import decoder

    few = dataclasses.replace(jax.tree.map(lambda x: x[:1, :256], batch), documents=batch.documents)

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
    import collections
    import tempfile

    import jax

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


ARMS = {
    "distil": (
        "e3jax:4:elementwise",
        "e3jax:4:selective",
        "e3jax:8:layer",
        "torch:compile:fused",
        "torch:compile:fused:micro4",
        "torch:liger:checkpoint:fused",
    ),
    "search": (
        "e3jax:4:elementwise",
        "e3jax:2:elementwise",
        "e3jax:4:selective",
        "torch:liger:fused",
        "torch:liger:checkpoint:fused",
        "e3jax:1:elementwise:masks4",
        "torch:liger:fused:masks4",
    ),
}

if __name__ == "__main__":
    main()
