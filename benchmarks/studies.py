"""The studies of docs/results.md that want a GPU, on those of one host, several at a time.

    python benchmarks/studies.py --folder /tmp/studies --model PATH/chain-math-24l \
        --data PATH/chain-math --texts PATH/wikitext-2/valid.txt PATH/tinystories/sample.txt

grids/studies.yaml lists them in the order in which they begin: `gpus` is the number of GPUs that a
study has for itself, for timings, or its share of one; `after` names studies that end before it
begins; `each` makes a study for every combination (names with a space: of values that belong
together). What a study prints is in FOLDER/NAME.log. Given
again, finished ones are not made again, and those that go on from where they were do so.
"""

import argparse
import fnmatch
import itertools
import os
import pathlib
import subprocess
import time

import yaml
from arms import ROOT

GRID = ROOT / "benchmarks" / "grids" / "studies.yaml"
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "PYTHONUNBUFFERED": "1",
    # As many threads as cores in each of many processes spin for each other.
    "OPENBLAS_NUM_THREADS": "2",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}


def main() -> None:
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    waiting = [x for x in studies(options) if not done(options, x["name"]).exists()]
    free = dict.fromkeys(gpus(), 1.0)
    if large := [x["name"] for x in waiting if x["gpus"] > len(free)]:
        tell(f"left out, for they need more than {len(free)} GPUs: {', '.join(large)}")
        waiting = [x for x in waiting if x["name"] not in large]
    running: list[tuple[subprocess.Popen, dict, list[str], float]] = []
    while waiting or running:
        for each in [x for x in running if x[0].poll() is not None]:
            running.remove(each)
            process, study, places, begun = each
            for place in places:
                free[place] += min(study["gpus"], 1.0)
            if process.returncode == 0:
                done(options, study["name"]).touch()
            tell(f"{study['name']}: {process.returncode}, {time.monotonic() - begun:.0f} s")
        named = {x["name"] for x in waiting} | {study["name"] for _, study, *_ in running}
        for study in list(waiting):
            if any(fnmatch.fnmatch(name, study.get("after", "")) for name in named):
                continue
            places = found(free, study["gpus"])
            if places is None:
                if study["gpus"] >= 1:
                    break  # what is smaller would take its place for ever
                continue
            waiting.remove(study)
            for place in places:
                free[place] -= min(study["gpus"], 1.0)
            running.append((start(options, study, places), study, places, time.monotonic()))
            tell(f"{study['name']}: GPU {', '.join(places) or 'none'}")
        time.sleep(0.2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("folder", "model", "data"):
        parser.add_argument(f"--{name}", required=True, type=pathlib.Path)
    parser.add_argument("--texts", nargs="+", default=[], help="of the second model")
    parser.add_argument("--grid", type=pathlib.Path, default=GRID)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of names")
    return parser.parse_args()


def studies(options: argparse.Namespace) -> list[dict]:
    """Each with its name, its command, its GPUs."""
    grid, listed = yaml.safe_load(options.grid.read_text(encoding="utf-8")), []
    places = {name: str(getattr(options, name)) for name in ("folder", "model", "data")}
    places |= {"texts": " ".join(options.texts)}
    for study in grid["studies"]:
        axes = study.pop("each", {})
        for values in itertools.product(*axes.values()):
            said = dict(places)
            for names, value in zip(axes, values, strict=True):
                several = " " in names
                said |= zip(names.split(), value if several else [value], strict=True)
            # A common part may name places, so it is filled in first.
            said |= {name: text.format(**said) for name, text in grid["common"].items()}
            words = {k: v.format(**said) for k, v in study.items() if isinstance(v, str)}
            if any(fnmatch.fnmatch(words["name"], pattern) for pattern in options.only):
                listed.append(study | words)
    return listed


def gpus() -> list[str]:
    """Those of the host, or the part of them that CUDA_VISIBLE_DEVICES names."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return given.split(",")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return [str(number) for number, _ in enumerate(listed.stdout.splitlines())]


def found(free: dict[str, float], wanted: float) -> list[str] | None:
    """Where there is room: the GPU that has most of it, or so many empty ones."""
    count = max(1, int(wanted)) if wanted else 0
    room = [place for place in free if free[place] >= min(wanted, 1.0) - 1e-6]
    return sorted(room, key=lambda place: -free[place])[:count] if len(room) >= count else None


def start(options: argparse.Namespace, study: dict, places: list[str]) -> subprocess.Popen:
    environment = os.environ | ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ",".join(places)}
    if study["gpus"] < 1:  # timings tell what compilation takes
        environment["JAX_COMPILATION_CACHE_DIR"] = str(options.folder / "compiled")
    with open(options.folder / f"{study['name']}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            ["bash", "-c", study["command"]], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


def done(options: argparse.Namespace, name: str) -> pathlib.Path:
    return options.folder / f"{name}.done"


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
