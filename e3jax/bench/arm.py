"""One arm: python -m e3jax.bench.arm TASK, with a Task as JSON. bench.py starts them."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from e3jax.bench import steps
from e3jax.bench.timing import give
from e3jax.hf.families import read_config

WARM = 3  # repetitions before those that count: torch.compile records its graphs in the second
# Of the logits' spread, in which two engines may differ: far below what a layer more or less makes.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


@dataclasses.dataclass(frozen=True)
class Task:
    """What an arm does."""

    engine: str  # e3jax or transformers
    folder: str  # the checkpoint's
    dtype: str
    batch: int
    prompt: int  # tokens
    new_tokens: int
    repeats: int
    seed: int
    logits: str  # file of ours, after the prompts: written by our arm, compared by theirs
    platform: str = ""  # where ours was


def e3jax(task: Task, prompts: np.ndarray) -> dict[str, Any]:
    import jax

    from e3jax import mesh
    from e3jax.hf.load import load_params

    device = jax.devices()[0]
    with jax.set_mesh(mesh.make_mesh(1, 1, 1, devices=[device])):
        cfg = read_config(task.folder)
        params = load_params(task.folder, cfg, task.dtype)
        made = steps.ours(params, cfg, prompts, np.dtype(task.dtype))
        np.save(task.logits, np.asarray(made.prefill(), np.float32))
        return _measured(task, made) | {"platform": device.platform, "device": device.device_kind}


def transformers(task: Task, prompts: np.ndarray) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if task.platform == "gpu" and not torch.cuda.is_available():
        return {"error": "torch sees no GPU; install a torch that is built for it"}
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=getattr(torch, task.dtype))
    model = model.eval().requires_grad_(False)
    made = steps.theirs(model.to("cuda" if task.platform == "gpu" else "cpu"), prompts)
    distance = steps.apart(np.load(task.logits), made.prefill().float().cpu().numpy())
    if not distance <= TOLERANCES[task.dtype]:
        return {"error": f"not the same work: its logits are {distance:.2g} of their spread away"}
    return _measured(task, made) | {"logits apart": distance}


def _measured(task: Task, made: steps.Steps) -> dict[str, Any]:
    seconds = steps.measure(made, task.new_tokens, WARM, task.repeats)
    return {"seconds": seconds, "memory": made.memory()}


def main(text: str) -> None:
    """Gives what the arm found, an exception as `error`."""
    task = Task(**json.loads(text))
    vocab_size = read_config(pathlib.Path(task.folder)).vocab_size
    prompts = steps.random_prompts(vocab_size, task.batch, task.prompt, task.seed)
    try:
        give({"e3jax": e3jax, "transformers": transformers}[task.engine](task, prompts))
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        give({"error": f"{type(error).__name__}: {said[0]}"[:200]})


if __name__ == "__main__":
    main(sys.argv[1])
