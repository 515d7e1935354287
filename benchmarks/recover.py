"""What a choice of the recovery is worth: one mask recovered with other settings, over seeds.

    python benchmarks/recover.py --config configs/demo.yaml --folder /tmp/study \
        --mask runs/demo/search/mask.json \
        --settings "distill.weight=uniform" "distill.weight=student distill.optimizer.lr=1e-3"

Or --grid benchmarks/grids/terms.yaml. The figure is the KL to the dense model on the windows of
data.measure (or the test problems), on which no recovery trains; differences to the first setting
of the first mask are paired, window by window and seed by seed, with the standard error over
windows of their means over the seeds. Finished recoveries are not made again. Writes
FOLDER/results.json.
"""

import argparse
import json
import logging
import pathlib
import shutil
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from e3jax import cli, configure, job, recovery  # noqa: E402
from e3jax.evaluate.behaviour import make_tokens  # noqa: E402
from e3jax.evaluate.intervals import apart  # noqa: E402
from e3jax.mask import read_mask  # noqa: E402


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    base = configure.load_run(options.config, [*options.overrides, f"out={options.folder}"])
    cli.prepare_jax(base)
    path = options.folder / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    with job.open_mesh(base.mesh):
        dense = job.open_job(base)
        first = None
        for mask in options.mask:
            for setting in options.settings:
                found = [of(rows, options, dense, mask, setting, seed) for seed in options.seeds]
                first = first or found
                tell(mask, setting, found, first)


def of(rows, options, dense, mask, setting, seed):
    """The row of one recovery, made where it is not among `rows`."""
    name = {"mask": str(mask), "setting": setting, "seed": seed}
    for row in rows:
        if name.items() <= row.items():
            return row
    out = options.folder / "now"
    shutil.rmtree(out, ignore_errors=True)  # of one that was killed
    overrides = [*options.overrides, *setting.split(), f"seed={seed}", f"out={out}"]
    run = configure.load_run(options.config, overrides)
    here = dense.having(out=out, run=run)
    keep = read_mask(mask, dense.cfg.num_layers)
    begun = time.monotonic()
    student = recovery.recover(here, keep, out / "student")
    spent = time.monotonic() - begun
    cfg = dense.cfg.take_layers(keep.keep)
    tokens = make_tokens(dense.cfg, cfg, dtype=here.dtype, chunk=run.distill.chunk)
    found = tokens(dense.params, student, job.ordered(dense.measured, run.evaluate.batch))
    shutil.rmtree(out)
    spent = {"tokens": run.distill.steps * run.distill.batch * run.data.window, "s": spent}
    rows.append(name | {"kl": found.figures().kl, "windows": found.windows()} | spent)
    path = options.folder / "results.json"
    path.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    return rows[-1]


def tell(mask, setting, found, first):
    kl = np.array([row["kl"] for row in found])
    mean, error = apart(*([row["windows"] for row in rows] for rows in (first, found)))
    ratio = kl.mean() / np.mean([row["kl"] for row in first])
    spread = kl.std(ddof=len(kl) > 1)
    print(
        f"{mask.parent.name}/{mask.stem} {setting}: {kl.mean():.5f} +- {spread:.5f}, to the "
        f"first {mean:+.5f} +- {error:.5f} ({ratio:.3f} x), {found[0]['tokens'] / 1e6:.2f} M "
        f"tokens, {np.mean([row['s'] for row in found]):.0f} s",
        flush=True,
    )


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--mask", required=True, nargs="+", type=pathlib.Path)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--settings", nargs="+", metavar="'KEY=VALUE ...'")
    which.add_argument("--grid", type=pathlib.Path, help="a YAML list of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    options.settings = options.settings or yaml.safe_load(options.grid.read_text())
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
