"""The same run on one GPU and on several: are the curves the same, and does a run that is killed on
several end on one as if nothing had happened?

    python benchmarks/several.py --gpus 2 --config configs/demo.yaml --folder /tmp/several

Runs `run.py distill` on one GPU, with FSDP over all, and with tensor parallelism over all; then
with FSDP once more, killed in the middle of the recovery and started again on one GPU. Differences
are the greatest over all steps, relative to one GPU's; held-out KL is of the last state. On a
machine without GPUs (`--cpu`) the same with CPU devices.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from arms import ROOT

sys.path.insert(0, str(ROOT))

from e3jax.training.metrics import read_metrics


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True)
    count = options.gpus
    sharded, split = f"mesh.data={count}", f"mesh.model={count}"
    run(options, "one", 1)
    run(options, "data", count, sharded)
    run(options, "model", count, split)
    killed = run(options, "moved", count, sharded, kill_after=options.kill)
    run(options, "moved", 1)
    print(f"{'':<34}{'search loss':>13}{'recovery loss':>15}{'held-out KL':>13}  removed")
    labels = {
        "one": "one",
        "data": f"{count}, FSDP",
        "model": f"{count}, tensor parallel",
        "moved": f"{count}, killed at step {killed}, then one",
    }
    for name, label in labels.items():
        search, recovery = (curve(options.folder / name / stage) for stage in ("search", "distill"))
        wanted = [curve(options.folder / "one" / stage) for stage in ("search", "distill")]
        print(
            f"{label:<34}{apart(search, wanted[0]):>13.1e}{apart(recovery, wanted[1]):>15.1e}"
            f"{last_kl(options.folder / name / 'distill'):>13.6f}"
            f"  {removed(options.folder / name)}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="made, and kept")
    parser.add_argument("--kill", type=int, default=30, help="after this step of the recovery")
    parser.add_argument("--cpu", action="store_true", help="CPU devices in their place")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


def run(options, name: str, count: int, *overrides: str, kill_after: int | None = None) -> int:
    """A run on `count` devices; with `kill_after` it gets SIGKILL after that step of the recovery.
    The steps of the recovery that are on record."""
    if options.cpu:
        devices = f"--xla_force_host_platform_device_count={count}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    else:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
    out = options.folder / name
    command = [sys.executable, str(ROOT / "run.py"), "distill", "--config", str(options.config)]
    command += [f"out={out}", *options.overrides, *overrides]
    begun = time.monotonic()
    with open(options.folder / f"{name}.log", "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while kill_after is not None and process.poll() is None:
            if len(curve(out / "distill")) > kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        code = process.wait()
    if code != (0 if kill_after is None else -signal.SIGKILL):
        raise SystemExit(f"{name} ended with {code}: see {options.folder / name}.log")
    steps = len(curve(out / "distill"))
    print(f"{name}: {count} devices, {steps} steps, {time.monotonic() - begun:.0f} s", flush=True)
    return steps


def curve(folder: pathlib.Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def apart(found: list[float], wanted: list[float]) -> float:
    """The greatest relative difference."""
    return max(abs(x - y) / abs(y) for x, y in zip(found, wanted, strict=True))


def last_kl(folder: pathlib.Path) -> float:
    """The held-out KL after the last step, nats a token."""
    return [line["held_out_kl"] for line in read_metrics(folder) if "held_out_kl" in line][-1]


def removed(out: pathlib.Path) -> list[int]:
    mask = json.loads((out / "search" / "mask.json").read_text(encoding="utf-8"))
    return sorted(set(range(mask["num_layers"])) - set(mask["keep"]))


if __name__ == "__main__":
    main()
