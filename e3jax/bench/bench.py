"""The `bench` command: a finished run's export beside the dense model, in jax and in transformers.

Each arm has a process of its own, one after the other, so that memory is its own; this one touches
no device. An arm of transformers is measured only where its logits after the prompts are ours.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any

from transformers.utils.import_utils import is_torch_available

from e3jax import __version__, config, files, job
from e3jax.bench import arm, work
from e3jax.bench.timing import middle, run_arm
from e3jax.errors import UserError
from e3jax.evaluate import speed
from e3jax.evaluate.speed import Arm, Speed
from e3jax.hf import aside, families, hub
from e3jax.models.config import ModelConfig
from e3jax.progress import log_file, over
from e3jax.report import page

log = logging.getLogger(__name__)

WITHOUT_TORCH = (
    "bench: torch is not installed, so transformers is not measured; to have it, `pip install "
    "torch` (where jax has a GPU, one that is built for it) and give the same command again"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The folders of the two models, and what is in them."""

    dense: pathlib.Path
    pruned: pathlib.Path
    configs: tuple[ModelConfig, ModelConfig]


def execute(run: config.Run, *, dry_run: bool = False) -> None:
    """Measures, prints the table, and writes it to bench/ in the run folder and into its report.

    Raises UserError where no export is there, or nothing could be measured.
    """
    pair, engines = find(run), ["e3jax"] + ["transformers"] * is_torch_available()
    if dry_run:
        count = len(set(run.bench.batch)) * len(engines) * len(speed.MODELS)
        print(f"{pair.dense} beside {pair.pruned}: {', '.join(engines)}, {count} processes")
        return
    with job.claim_folder(run) as out, log_file(out, f"bench: e3jax {__version__}"):
        if "transformers" not in engines:
            log.info(WITHOUT_TORCH)
        found = measure(run, pair, engines)
        speed.write(out / "bench", found)
        page.write([out], out / page.REPORT)
    print(f"{speed.render(found)}\n\n{out}/bench   report: {out}/{page.REPORT}")


def find(run: config.Run) -> Pair:
    """The models of a run folder. Raises UserError where they are not there, are not of each other,
    or have no room for the tokens."""
    out, spec = pathlib.Path(run.out).expanduser(), run.bench
    pruned = out / "export"
    if not (pruned / aside.RECORD).is_file():
        raise UserError(
            f"{pruned}: no export is there to be measured; give `run` or `export` with the same "
            "configuration first"
        )
    dense = hub.resolve(run.model.path, run.model.revision)
    if files.read_json(pruned / aside.RECORD).get("model") != files.checkpoint_hash(dense):
        raise UserError(f"{pruned}: was made of another checkpoint than model.path={dense}")
    configs = families.read_config(dense), families.read_config(pruned)
    if spec.prompt + spec.new_tokens > configs[0].max_position:
        raise UserError(
            f"bench.prompt={spec.prompt} and bench.new_tokens={spec.new_tokens}: the model's "
            f"context is {configs[0].max_position} tokens"
        )
    return Pair(dense, pruned, configs)


def measure(run: config.Run, pair: Pair, engines: list[str]) -> Speed:
    """All arms. Raises UserError where none could be measured."""
    spec, batches = run.bench, list(dict.fromkeys(run.bench.batch))
    places = dict(zip(speed.MODELS, (pair.dense, pair.pruned)))
    platform, device, arms = "", "", []
    with tempfile.TemporaryDirectory(prefix="e3jax-bench-") as kept:
        order = list(itertools.product(batches, engines, speed.MODELS))
        for batch, engine, model in over("models measured", order, len(order)):
            logits = pathlib.Path(kept) / f"{model}-{batch}.npy"
            task = arm.Task(
                engine=engine,
                folder=str(places[model].absolute()),
                dtype=run.model.dtype,
                batch=batch,
                prompt=spec.prompt,
                new_tokens=spec.new_tokens,
                repeats=spec.repeats,
                seed=run.seed,
                logits=str(logits),
                platform=platform,
            )
            found: dict[str, Any]
            if engine != "e3jax" and not (platform and logits.is_file()):
                found = {"error": "e3jax has no logits to compare with"}
            elif engine != "e3jax" and platform not in ("cpu", "gpu"):
                found = {"error": f"not measured on a {platform}"}
            else:
                found = _run(task)
            platform, device = found.get("platform", platform), found.get("device", device)
            arms.append(_arm(task, model, found))
            log.info("bench: %s", _told(arms[-1]))
    if all(one.error for one in arms):
        raise UserError(
            f"bench: nothing could be measured: {arms[0].error}; a model must fit on one device: "
            "bench.batch and bench.prompt are what can be made smaller"
        )
    return Speed(
        device=device,
        on_host=platform == "cpu",
        dtype=run.model.dtype,
        prompt=spec.prompt,
        new_tokens=spec.new_tokens,
        repeats=spec.repeats,
        layers=(pair.configs[0].num_layers, pair.configs[1].num_layers),
        ideals={str(batch): ideals(run, pair, batch) for batch in batches},
        versions=versions(engines),
        arms=arms,
    )


def ideals(run: config.Run, pair: Pair, batch: int) -> dict[str, float]:
    """The dense model's work by the pruned one's: operations of a prefill, bytes of a token decoded
    halfway through the answers."""
    spec, size = run.bench, {"float32": 4, "bfloat16": 2}[run.model.dtype]
    seen = spec.prompt + spec.new_tokens / 2
    flops = [work.prefill_flops(cfg, spec.prompt) for cfg in pair.configs]
    read = [work.decode_bytes(cfg, batch, seen, size) for cfg in pair.configs]
    return {"prefill": flops[0] / flops[1], "decode": read[0] / read[1]}


def versions(engines: list[str]) -> dict[str, str]:
    """Of what was measured."""
    named = ["jax"] + ["transformers", "torch"] * ("transformers" in engines)
    return {"e3jax": __version__} | {name: importlib.metadata.version(name) for name in named}


def _run(task: arm.Task) -> dict[str, Any]:
    """What an arm found, in a process that imports this package, wherever it lies."""
    places = [str(pathlib.Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(":")]
    told = json.dumps(dataclasses.asdict(task))
    command = [sys.executable, "-m", arm.__name__, told]
    return run_arm(command, PYTHONPATH=":".join(filter(None, places)))


def _arm(task: arm.Task, model: str, found: dict[str, Any]) -> Arm:
    if "error" in found:
        return Arm(task.engine, model, task.batch, {}, None, found["error"])
    tokens = {"prefill": task.prompt, "decode": task.new_tokens - 1, "end to end": task.new_tokens}
    rates = {}
    for phase, seconds in found["seconds"].items():
        if min(seconds) > 0:  # decoding is a difference: of few tokens it may drown in noise
            median, spread = middle(seconds)
            rates[phase] = (task.batch * tokens[phase] / median, spread)
    return Arm(task.engine, model, task.batch, rates, found["memory"])


def _told(one: Arm) -> str:
    said = one.error or ", ".join(
        f"{phase} {rate:,.0f} tokens/s" for phase, (rate, _) in one.rates.items()
    )
    return f"{one.engine} {one.model}, {speed.rows(one.batch)}: {said}"
