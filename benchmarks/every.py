"""Every set of K layers of a small model scored, and where found masks rank among them.

    python benchmarks/every.py --config configs/chain-math.yaml --folder /tmp/every --first 16 \
        --again 300 --masks runs/*/mask.json -- data.measure.0.rows='["-1500:"]' ...

The first windows of data.measure rank all C(L, K) sets by KL to the dense model, in bfloat16; the
best are scored again on all windows, in model.dtype, with the masks given. Sets that begin alike
share what they compute: the sets are the leaves of a tree of which a layer is run once for each
node, 0.5 M times instead of the 2.4 M of C(24, 18) sets one by one. Nodes at one depth wait until
there are --chunk of them; the deepest go first, so few are in memory.
One GPU, or a CPU for few layers.
Writes FOLDER/every.npy (float32, nats a token, in the order of itertools.combinations of the layers
removed), which another run takes as it is, and FOLDER/best.json.
"""

import argparse
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
        remove = dense.cfg.num_layers - resolve_keep(run.search.keep, dense.cfg.num_layers)
        (batch,) = job.ordered(dense.measured, options.first, options.first)
        sets = list(itertools.combinations(range(dense.cfg.num_layers), remove))
        kept = options.folder / "every.npy"
        if kept.exists():
            found = dict(zip(sets, np.load(kept)))
        else:
            begun = time.monotonic()
            found = score_all(dense, mesh.shard_batch(batch), remove, options.chunk)
            print(f"{len(found):,} sets in {time.monotonic() - begun:.0f} s", flush=True)
            np.save(kept, np.array([found[s] for s in sets], np.float32))
        rows = again(dense, found, options)
    (options.folder / "best.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        if row["rank"] <= 12 or row["from"]:
            print(f"{row['rank']:>6} {row['kl']:.4f} {row['removed']} {' '.join(row['from'])}")


def score_all(dense: job.Job, batch: decoder.Batch, remove: int, chunk: int) -> dict:
    """Layers removed -> KL, of all sets."""
    cfg, params = dense.cfg, jax.tree.map(lambda w: w.astype(jnp.bfloat16), dense.params)
    many = jax.tree.map(lambda x: jnp.concatenate([x] * chunk), batch)
    head, rows = decoder.head(params, cfg), len(batch.tokens)

    @jax.jit
    def run_layer(index: jax.Array, *nodes: jax.Array) -> tuple[jax.Array, ...]:
        apply = decoder.by_number(params, cfg, decoder.applier(many, cfg, jnp.bfloat16))
        h = apply(index, jnp.concatenate(nodes))
        return tuple(h[i * rows : (i + 1) * rows] for i in range(chunk))

    @jax.jit
    def score(h_dense: jax.Array, *nodes: jax.Array) -> jax.Array:
        teacher = losses.Online(jnp.concatenate([h_dense] * chunk), head)
        h = decoder.last_norm(params, jnp.concatenate(nodes), cfg)
        objective = losses.Objective(chunk=16384)
        _, sums = losses.token_sums(h, head, many.targets, many.mask, teacher, objective)
        return sums.kl.reshape(chunk, -1).sum(-1) / jnp.sum(batch.mask)

    def whole(nodes: list) -> list:
        return nodes + nodes[-1:] * (chunk - len(nodes))  # the rest of a chunk is not looked at

    h_dense = decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16, remat="none")
    start = decoder.first_stream(params, batch.tokens, cfg, jnp.bfloat16)
    waiting = [[] for _ in range(cfg.num_layers + 1)]  # by depth: (layers removed, stream)
    waiting[0].append(((), start))
    found, scored = {}, []
    while any(waiting):
        full = [depth for depth, nodes in enumerate(waiting) if len(nodes) >= chunk]
        depth = max(full) if full else next(d for d, nodes in enumerate(waiting) if nodes)
        nodes, waiting[depth] = waiting[depth][:chunk], waiting[depth][chunk:]
        names, streams = map(list, zip(*nodes))
        if depth == cfg.num_layers:
            scored.append((names, score(h_dense, *whole(streams))))
            if len(scored) > 64:  # the device is never waited for where it has work
                names, kl = scored.pop(0)
                found.update(zip(names, np.asarray(kl)))
            continue
        waiting[depth + 1] += [((*n, depth), h) for n, h in nodes if len(n) < remove]
        kept = [(n, h) for n, h in nodes if remove - len(n) < cfg.num_layers - depth]
        if kept:
            names, streams = map(list, zip(*kept))
            waiting[depth + 1] += zip(names, run_layer(depth, *whole(streams)))
    for names, kl in scored:
        found.update(zip(names, np.asarray(kl)))
    return found


def again(dense: job.Job, found: dict, options: argparse.Namespace) -> list[dict]:
    """The best sets and the masks given, by their KL on all windows."""
    layers, names = range(dense.cfg.num_layers), {}
    for path in options.masks:
        keep = json.loads(path.read_text())["keep"]
        names.setdefault(tuple(i for i in layers if i not in keep), []).append(str(path))
    best = sorted(found, key=found.get)[: options.again]
    figures = make_figures(dense.cfg, dense.cfg, dtype=dense.dtype, chunk=4096)
    batches = list(job.ordered(dense.measured, dense.run.evaluate.batch))
    rows = []
    for removed in dict.fromkeys([*best, *names]):
        keep = [i for i in layers if i not in removed]
        kl = figures(dense.params, dense.params, batches, keep).kl
        first = float(found[removed])
        rows.append({"removed": removed, "kl": kl, "first": first, "from": names.get(removed, [])})
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
    parser.add_argument("--chunk", type=int, default=32, help="nodes a call")
    parser.add_argument("--masks", type=pathlib.Path, nargs="*", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    main()
