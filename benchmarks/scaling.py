"""Our search and distillation steps on one GPU and on several of one host.

    python benchmarks/scaling.py --shapes 4b 8b --gpus 1 2

Each row is an arm of steps.py, with as many tokens a GPU and step on every mesh: weights are
sharded over `data` (FSDP) or `model` (tensor parallel). Of linear: tokens/s against as many times
those of one GPU in the same run, where one can hold it.
"""

import argparse
import sys

from arms import ROOT, ROW, SHAPES, run_arm
from steps import flops_per_token, gpus

from e3jax.bench.timing import middle

STEPS = str(ROOT / "benchmarks" / "steps.py")
WAYS = ["data", "model"]
PASSES = {  # rows a GPU and forward pass, on one GPU and on several: what 80 GB hold
    ("search", "4b"): (4, 4),
    ("search", "8b"): (4, 4),
    ("distil", "4b"): (1, 2),
    ("distil", "8b"): (1, 1),
}


def main() -> None:
    options = parse()
    rate = run_arm(STEPS, ["search"], "matmul")["rate"]
    print(f"bfloat16 8192^3 on one GPU: {rate / 1e12:.0f} TFLOP/s", flush=True)
    heads = f"{'step':<8}{'shapes':<7}{'arm':<36}{'tokens/s':>10}{'spread':>8}{'share':>7}"
    print(f"{heads}{'GiB':>6}{'of linear':>10}{'KL':>9}")
    for step in options.steps:
        for shapes in options.shapes:
            single = None
            for arm in arms(step, shapes, options.gpus, options.ways):
                count = gpus(arm)
                tokens = options.rows * count * ROW
                said = ["--shapes", shapes, "--tokens", str(tokens), "--chunk", str(options.chunk)]
                found = run_arm(STEPS, [step, *said], arm)
                label = f"{step:<8}{shapes:<7}{arm:<36}"
                if "error" in found:
                    print(label, found["error"], flush=True)
                    continue
                median, spread = middle(found["seconds"])
                speed = tokens / median
                single = speed if count == 1 else single
                wanted = argparse.Namespace(step=step, shapes=shapes, layers=None)
                share = speed * flops_per_token(wanted, arm) / rate / count
                linear = f"{speed / count / single:.1%}" if single else "-"
                print(
                    f"{label}{speed:>10,.0f}{spread:>8.1%}{share:>7.3f}"
                    f"{found['peak'] / 2**30:>6.1f}{linear:>10}{found['kl']:>9.4f}",
                    flush=True,
                )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--steps", nargs="+", choices=("distil", "search"), default=["search", "distil"]
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["4b", "8b"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="to share weights")
    parser.add_argument("--rows", type=int, default=4, help="of 4096 tokens, a GPU and step")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens whose logits exist")
    return parser.parse_args(sys.argv[1:])


def arms(step: str, shapes: str, counts: list[int], ways: list[str]) -> list[str]:
    """One GPU, and each way to share the weights among several."""
    found = []
    for count in counts:
        one, several = PASSES.get((step, shapes), (2, 2))
        arm = f"e3jax:{count * (one if count == 1 else several)}:selective"
        found += [arm] if count == 1 else [f"{arm}:{way}{count}" for way in ways]
    return found


if __name__ == "__main__":
    main()
