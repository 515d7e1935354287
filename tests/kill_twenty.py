"""Ends a short run at random moments; every restart must end with the very bits of a whole run.

    python tests/kill_twenty.py [--times 20] [--signal KILL or TERM] [--seed 0]

The run searches, writes a teacher cache, distils from it and exports. Not part of the tests: it
takes a quarter of an hour on two cores. Exit code 1 where a result differs.
"""

import argparse
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np

from test_restart import final_state, start, stderr, write_configuration

OVERRIDES = ("distill.teacher=cache", "distill.top_k=8", "distill.microbatch=2")
SAME = ("search/mask.json", "search/metrics.jsonl", "distill/metrics.jsonl")
SAME += ("teacher/finished.json", "export/model.safetensors", "export/config.json")


def result(out):
    """All that a run leaves and that decides what its user gets."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(final_state(out))]
    state = [(x.dtype.name, x.shape, x.tobytes()) for x in leaves]
    return {"state": state} | {name: (out / name).read_bytes() for name in SAME}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    code = signal.Signals[f"SIG{options.signal}"]
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        configuration = write_configuration(pathlib.Path(folder))

        def run(out, after=None):
            """The exit code of a run, which gets the signal after so many seconds."""
            process = start(configuration, "export", f"out={out}", *OVERRIDES)
            if after is not None:
                time.sleep(after)
                process.send_signal(code)
            return process.wait()

        assert run(f"{folder}/compiles") == 0, stderr(configuration)
        begun = time.monotonic()
        assert run(f"{folder}/whole") == 0, stderr(configuration)
        length = time.monotonic() - begun
        want, wrong = result(pathlib.Path(folder) / "whole"), 0
        for number in range(options.times):
            out = pathlib.Path(folder) / f"ended-{number}"
            after = moments.uniform(0, length)
            ended = run(out, after)
            told = [line for line in stderr(configuration).splitlines() if "XLA" not in line]
            where = next((x for x in reversed(told) if x[:6] in PLACES), "loading")
            again = run(out)
            assert again == 0, stderr(configuration)
            differ = [name for name, value in result(out).items() if value != want[name]]
            wrong += bool(differ)
            print(
                f"{number + 1:3} after {after:5.1f} of {length:.1f} s (exit {ended}, in: "
                f"{where[:40]}): {'the same' if not differ else f'DIFFERS: {differ}'}",
                flush=True,
            )
    print(f"{options.times - wrong} of {options.times} restarts ended with the same bits")
    return int(wrong > 0)


PLACES = ("search", "distil", "teache", "export", "import")

if __name__ == "__main__":
    sys.exit(main())
