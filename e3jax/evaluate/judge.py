"""A program that compares mathematical answers by math-verify; grading.py starts it.

A process of its own: an answer may take all time and all memory (SymPy multiplies 9^{9^9} out), and
math-verify's own limits are Python's signal handlers, which wait for compiled code and are the main
thread's alone. Here a comparison that takes too long ends the process. It imports nothing of e3jax.

    judge.py SECONDS

A line in: a JSON list of the gold answer and another, both LaTeX. A line out: 1 where they are
equal, else 0. The first line out is READY, or what is wrong.
"""

# pyright: reportMissingImports=false
# It is optional.

import contextlib
import json
import logging
import resource
import signal
import sys

READY = "ready"
MEMORY = 4 * 2**30  # bytes; it begins with 0.2 GiB


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        print(str(error).splitlines()[0], file=replies)
        return
    logging.disable()
    with contextlib.suppress(ValueError, OSError):  # less is allowed already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(answer: str) -> list:
        return parse(rf"\boxed{{{answer}}}", latex, parsing_timeout=None)  # pyright: ignore

    print(READY, file=replies, flush=True)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))  # nothing handles it: the process ends
        gold, other = map(parsed, json.loads(line))
        equal = verify(gold, other, timeout_seconds=None)
        signal.alarm(0)
        print(int(equal), file=replies, flush=True)


if __name__ == "__main__":
    main()
