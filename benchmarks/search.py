"""What a choice of the search is worth: the same search with other settings, over seeds.

    python benchmarks/search.py --config configs/demo.yaml --folder /tmp/study \
        --settings "search.estimator=mixed" "search.batch=4 search.masks_per_window=4"

Or --grid benchmarks/grids/search.yaml. The figure is the KL to the dense model of what is left,
nothing trained, on the windows of data.measure (or the test problems), which no search sees. The
curve is the best held-out KL so far
against what it cost, in millions of tokens that went through the dense model forward: a masked
model's forward pass counts 1 a token, the backward pass to its gates 1, the dense model's pass 1 a
window, shared by its masks. Finished searches are not made again. Writes FOLDER/results.json.
"""

import argparse
import json
import logging
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from e3jax import choice, cli, configure, job  # noqa: E402
from e3jax.evaluate.figures import make_figures  # noqa: E402
from e3jax.training.metrics import read_metrics  # noqa: E402


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    base = configure.load_run(options.config, [*options.overrides, f"out={options.folder}"])
    cli.prepare_jax(base)
    rows = []
    with job.open_mesh(base.mesh):
        dense = job.open_job(base)
        figures = make_figures(dense.cfg, dense.cfg, dtype=dense.dtype, chunk=base.distill.chunk)
        for setting in options.settings:
            found = [search(options, dense, figures, setting, seed) for seed in options.seeds]
            rows += found
            tell(setting, found, options.reach)
            text = json.dumps(rows, indent=2) + "\n"
            (options.folder / "results.json").write_text(text, encoding="utf-8")


def search(options, dense, figures, setting, seed):
    """One search, its figure and its curve."""
    out = options.folder / f"{setting.replace(' ', '_')}-{seed}"
    overrides = [*options.overrides, *setting.split(), f"seed={seed}", f"out={out}"]
    run = configure.load_run(options.config, overrides)
    begun = time.monotonic()
    mask = choice.search_mask(dense.having(run=run, out=out))
    spent = time.monotonic() - begun
    batches = job.ordered(dense.measured, run.evaluate.batch)
    kl = figures(dense.params, dense.params, batches, mask.keep).kl
    print(
        f"{setting} seed {seed}: {kl:.4f}, removed {sorted(mask.order)}, {spent:.0f} s", flush=True
    )
    return {
        "setting": setting,
        "seed": seed,
        "kl": kl,
        "keep": mask.keep,
        "held_out": mask.kl,
        "curve": curve(run.search, out / "search"),
    }


def curve(spec, folder):
    """(cost in millions of tokens, best held-out KL) whenever the answer was scored."""
    each = 1 + (spec.estimator != "score") + (spec.loss == "kl") / spec.masks_per_window
    points, tokens = [], 0.0
    for line in read_metrics(folder):
        tokens += line.get("tokens", 0.0)
        if "best_kl" in line:
            points.append((tokens * each / 1e6, line["best_kl"]))
    return points


def tell(setting, found, levels):
    kl = np.array([row["kl"] for row in found])
    print(
        f"{setting}: {kl.mean():.4f} +- {kl.std(ddof=len(kl) > 1):.4f}, least {kl.min():.4f}, "
        f"greatest {kl.max():.4f}"
    )
    costs = [point[0] for point in found[0]["curve"]]
    means = np.mean([[point[1] for point in row["curve"]] for row in found], axis=0)
    shown = range(0, len(costs), max(1, len(costs) // 8))
    print("  cost   " + " ".join(f"{costs[i]:8.3f}" for i in shown))
    print("  best KL" + " ".join(f"{means[i]:8.4f}" for i in shown))
    for level in levels:
        reached = [next((c for c, kl in row["curve"] if kl <= level), np.inf) for row in found]
        print(f"  KL {level:g} reached at {np.median(reached):.3f} M (median; inf = never)")
    sys.stdout.flush()


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--settings", nargs="+", metavar="'KEY=VALUE ...'")
    which.add_argument("--grid", type=pathlib.Path, help="a YAML list of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reach", type=float, nargs="+", default=[], metavar="KL")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    options.settings = options.settings or yaml.safe_load(options.grid.read_text())
    return options


if __name__ == "__main__":
    main()
