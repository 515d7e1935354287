"""Every set of K layers of a small model scored, and where found masks rank among them.

    python benchmarks/every.py --config configs/chain-math.yaml --folder /tmp/every --first 16 \
        --again 300 --masks runs/*/mask.json -- data.measure.0.rows='["-1500:"]' ...

The first windows of data.measure rank all C(L, K) sets by KL to the dense model, in bfloat16; the
best are scored again on all windows, in model.dtype, with the masks given. Sets that begin alike
share what they compute: the sets are the leaves of a tree of which a layer is run once for each
node, 0.5 M times instead of the 2.4 M of C(24, 18) sets one by one. Nodes at one depth wait until
there are --chunk of them; the deepest go first, so few are in memory, in a pool of streams.
One GPU, or a CPU for few layers.
Writes FOLDER/every.npy (float32, nats a token, in the order of itertools.combinations of the layers
removed), which another run takes as it is, and FOLDER/best.json.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from e3jax import configure, job, mesh  # noqa: E402
from e3jax.distill import losses  # noqa: E402
from e3jax.evaluate.figures import make_figures  # noqa: E402
from e3jax.models import decoder  # noqa: E402
from e3jax.search.search import resolve_keep  # noqa: E402


def main() -> None:
    options = parse()
    run = configure.load_run(options.config, options.overrides)
    options.folder.mkdir(parents=True, exist_ok=True)
    with job.open_mesh(run.mesh):
        dense = job.open_job(run)
        layers = dense.cfg.num_layers
        remove = layers - resolve_keep(run.search.keep, layers)
        (batch,) = job.ordered(dense.measured, options.first, options.first)
        sets = np.array(list(itertools.combinations(range(layers), remove)), np.int8)
        kept = options.folder / "every.npy"
        if not kept.exists():
            begun = time.monotonic()
            codes, kl = score_all(dense, mesh.shard_batch(batch), remove, options.chunk)
            print(f"{len(kl):,} sets in {time.monotonic() - begun:.0f} s", flush=True)
            order = np.argsort(codes)
            np.save(kept, kl[order][np.searchsorted(codes[order], code(sets))])
        rows = again(dense, sets, np.load(kept), options)
    (options.folder / "best.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        if row["rank"] <= 12 or row["from"]:
            print(f"{row['rank']:>6} {row['kl']:.4f} {row['removed']} {' '.join(row['from'])}")


def code(sets: np.ndarray) -> np.ndarray:
    """A number for each set of layers, int64 [N] of int [N, R]: bit i for layer i."""
    return np.sum(np.int64(1) << sets.astype(np.int64), axis=-1)


def score_all(
    dense: job.Job, batch: decoder.Batch, remove: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `code` of the layers removed, int64 [N], and the KL, float32 [N], of all sets.

    A node is (layers removed, their number, the place of its residual stream in the pool). Of its
    two children the one without the next layer inherits the place.
    """
    cfg, params = dense.cfg, jax.tree.map(lambda w: w.astype(jnp.bfloat16), dense.params)
    repeat = jax.jit(lambda batch: jax.tree.map(lambda x: mesh.repeat_rows(x, chunk), batch))
    many, by_row = repeat(batch), mesh.spec(("batch", None, None, None))  # each row for all nodes

    def streams(pool: jax.Array, places: jax.Array) -> jax.Array:
        """[rows x chunk, T, D]."""
        found = pool.at[:, places].get(out_sharding=by_row)
        shape = (-1, *pool.shape[2:])
        return found.reshape(shape, out_sharding=mesh.spec(("batch", None, None)))

    @functools.partial(jax.jit, donate_argnums=0)
    def run_layer(pool, params, many, index, sources, targets):
        apply = decoder.by_number(params, cfg, decoder.applier(many, cfg, jnp.bfloat16))
        h = apply(index, streams(pool, sources))
        h = h.reshape(len(pool), chunk, *pool.shape[2:], out_sharding=by_row)
        return pool.at[:, targets].set(h)

    @jax.jit
    def score(pool, params, many, h_dense, sources):
        teacher = losses.Online(h_dense, decoder.head(params, cfg))
        h = decoder.last_norm(params, streams(pool, sources), cfg)
        objective = losses.Objective(chunk=16384)
        _, sums = losses.token_sums(h, teacher.head, many.targets, many.mask, teacher, objective)
        kl = jax.sharding.reshard(sums.kl, mesh.spec((None,))).reshape(-1, chunk)
        return jnp.sum(kl, axis=0) / (jnp.sum(many.mask) / chunk)

    def whole(places: list[int], rest: int) -> np.ndarray:
        return np.array(places + [rest] * (chunk - len(places)), np.int32)

    h_dense = decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16, remat="none")
    start = decoder.first_stream(params, batch.tokens, cfg, jnp.bfloat16)
    # A depth has fewer than a chunk waiting before a chunk of the one above adds at most two.
    size = (cfg.num_layers + 3) * chunk
    shape = (len(start), size + 1, *start.shape[1:])  # the last is nobody's
    pool = jnp.zeros(shape, start.dtype, out_sharding=by_row).at[:, 0].set(start)
    free = list(range(1, size))
    waiting: list[list[tuple[int, int, int]]] = [[] for _ in range(cfg.num_layers + 1)]
    waiting[0].append((0, 0, 0))
    codes, scored, begun = [], [], time.monotonic()
    while any(waiting):
        full = [depth for depth, nodes in enumerate(waiting) if len(nodes) >= chunk]
        depth = max(full) if full else next(d for d, nodes in enumerate(waiting) if nodes)
        nodes, waiting[depth] = waiting[depth][:chunk], waiting[depth][chunk:]
        if depth == cfg.num_layers:
            places = [place for _, _, place in nodes]
            scored.append((len(nodes), score(pool, params, many, h_dense, whole(places, size))))
            codes += [removed for removed, _, _ in nodes]
            free += places
            if len(scored) % 500 == 0:
                print(f"{len(codes):,} sets in {time.monotonic() - begun:.0f} s", flush=True)
            continue
        sources, targets, children = [], [], waiting[depth + 1]
        for removed, count, place in nodes:
            below = count < remove  # the set without this layer is one to score
            if remove - count < cfg.num_layers - depth:
                sources.append(place)
                targets.append(free.pop() if below else place)
                children.append((removed, count, targets[-1]))
            if below:
                children.append((removed | 1 << depth, count + 1, place))
        if sources:
            sources, targets = whole(sources, size), whole(targets, size)
            pool = run_layer(pool, params, many, depth, sources, targets)
    kl = [np.asarray(kl)[:count] for count, kl in scored]
    return np.array(codes, np.int64), np.concatenate(kl)


def again(
    dense: job.Job, sets: np.ndarray, found: np.ndarray, options: argparse.Namespace
) -> list[dict]:
    """The best sets and the masks given, by their KL on all windows."""
    layers, names = range(dense.cfg.num_layers), {}
    for path in options.masks:
        keep = json.loads(path.read_text())["keep"]
        names.setdefault(tuple(i for i in layers if i not in keep), []).append(str(path))
    best = [tuple(map(int, sets[at])) for at in np.argsort(found)[: options.again]]
    figures = make_figures(dense.cfg, dense.cfg, dtype=dense.dtype, chunk=4096)
    batches = list(job.ordered(dense.measured, dense.run.evaluate.batch))
    codes, rows = code(sets), []
    for removed in dict.fromkeys([*best, *names]):
        keep = [i for i in layers if i not in removed]
        kl = figures(dense.params, dense.params, batches, keep).kl
        (at,) = np.flatnonzero(codes == code(np.array(removed)))
        first = {"first": float(found[at]), "first_rank": 1 + int(np.sum(found < found[at]))}
        rows.append({"removed": removed, "kl": kl, "from": names.get(removed, []), **first})
    rows.sort(key=lambda row: row["kl"])
    for rank, row in enumerate(rows, 1):  # of one that is not among the best it is at least this
        row["rank"] = rank
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--first", type=int, default=16, help="windows that rank all sets")
    parser.add_argument("--again", type=int, default=300, help="sets scored on all windows")
    parser.add_argument("--chunk", type=int, default=128, help="nodes a call")
    parser.add_argument("--masks", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    main()
