"""Seconds of a step, and an arm of a measurement in a process of its own."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

RESULT = "RESULT "  # begins the line in which an arm tells what it measured


def run_arm(command: Sequence[str], **environment: str) -> dict[str, Any]:
    """What an arm gave, in a process that has the GPU for itself and preallocates nothing; its last
    words as `error` where it gave nothing."""
    alone = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    done = subprocess.run(command, env=alone | environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line[len(RESULT) :])
    lines = [line for line in done.stderr.splitlines() if "Error" in line or "memory" in line]
    ended = f"nothing was said; exit code {done.returncode}"
    return {"error": (lines or done.stderr.splitlines() or [ended])[-1][:200]}


def give(found: dict[str, Any]) -> None:
    """How an arm tells what it measured."""
    print(RESULT + json.dumps(found), flush=True)


def seconds(step: Callable[[], Any]) -> float:
    """Of a step that returns when the device is done."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the spread (greatest less least) as a share of it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median
