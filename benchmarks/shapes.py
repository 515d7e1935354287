"""What all arms of steps.py have in common: models, rows, and how a step is timed."""

import argparse
import time

ROW = 4096
VOCAB = 151_936
WARM, STEPS = 4, 6
SHAPES = {  # layers, width, mlp, heads, key-value heads, tied; heads are 128 wide
    "0.6b": (28, 1024, 3072, 16, 8, True),
    "1.7b": (28, 2048, 6144, 16, 8, True),
    "4b": (36, 2560, 9728, 32, 8, True),
    "8b": (36, 4096, 12288, 32, 8, False),
}
LR = 1e-5


def kept(options: argparse.Namespace) -> list[int]:
    """The student's layers: every fourth is removed."""
    return [i for i in range(SHAPES[options.shapes][0]) if i % 4 != 2]


def timed(step, synchronise) -> tuple[float, list[float]]:
    """Seconds of the first call, and of those after the warm-up."""
    begun = time.perf_counter()
    step()
    synchronise()
    first = time.perf_counter() - begun
    seconds = []
    for number in range(WARM - 1 + STEPS):
        begun = time.perf_counter()
        step()
        synchronise()
        if number >= WARM - 1:
            seconds.append(time.perf_counter() - begun)
    return first, seconds
