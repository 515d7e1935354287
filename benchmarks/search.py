"""What a choice of the search is worth: the same search with one key varied, over seeds.

    python benchmarks/search.py --config configs/demo.yaml --folder /tmp/study \
        --vary search.estimator=mixed,score,straight_through --seeds 0 1 2

Every search sees the same number of windows. The figure is the KL to the dense model of what is
left, nothing trained, on the windows of data.measure (or the test problems), which no search sees.
Finished searches are not made again. Writes FOLDER/results.json.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from e3jax import configure, job, stages  # noqa: E402
from e3jax.evaluate.figures import make_figures  # noqa: E402


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    key, _, values = options.vary.partition("=")
    jax.config.update("jax_threefry_partitionable", True)
    base = configure.load_run(options.config, [*options.overrides, f"out={options.folder}"])
    rows = []
    with job.open_mesh(base.mesh):
        dense = job.open_job(base)
        figures = make_figures(dense.cfg, dense.cfg, dtype=dense.dtype, chunk=base.distill.chunk)
        for value in values.split(","):
            found = [search(options, dense, figures, f"{key}={value}", s) for s in options.seeds]
            rows += found
            kl = np.array([row["kl"] for row in found])
            spread = f"{kl.mean():.4f} +- {kl.std(ddof=len(kl) > 1):.4f}"
            ends = f"least {kl.min():.4f}, greatest {kl.max():.4f}"
            print(f"{value:<20} {spread}  {ends}", flush=True)
            text = json.dumps(rows, indent=2) + "\n"
            (options.folder / "results.json").write_text(text, encoding="utf-8")


def search(options, dense, figures, setting, seed):
    """One search and its figure."""
    out = options.folder / f"{setting}-{seed}"
    run = configure.load_run(
        options.config, [*options.overrides, setting, f"seed={seed}", f"out={out}"]
    )
    begun = time.monotonic()
    one = dataclasses.replace(dense, run=run, out=out)
    mask = stages.search_mask(one)
    batches = job.ordered(dense.measured, run.evaluate.batch)
    kl = figures(dense.params, dense.params, batches, mask.keep).kl
    spent = time.monotonic() - begun
    removed = f"removed {sorted(mask.order)}"
    print(f"{setting} seed {seed}: {kl:.4f}, {removed}, {spent:.0f} s", flush=True)
    return {"setting": setting, "seed": seed, "kl": kl, "keep": mask.keep, "held_out": mask.kl}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--vary", required=True, metavar="KEY=VALUE,VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":
    main()
