"""The loop both stages run: prefetched batches, late metrics, checkpoints, evaluation, signals."""

import contextlib
import dataclasses
import pathlib
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from e3jax import mesh, processes
from e3jax.data.batches import prefetch
from e3jax.errors import Diverged
from e3jax.training.checkpoint import abstract, open_checkpoints
from e3jax.training.metrics import Metrics

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
Evaluate = Callable[[int, Any], tuple[Any, dict[str, Any]]]


def fit(
    name: str,
    step_fn: Step,
    state: Any,
    batches: Callable[[int], Any],
    *,
    steps: int,
    folder: pathlib.Path,
    inputs: Mapping[str, Any],
    checkpoint_every: int,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    patience: int = 10,
    keep: int = 2,
    best: str | None = None,
) -> Any:
    """Runs steps [last checkpoint, steps) and returns the final state.

    step_fn: jitted (state, device batch) -> (state, float32 scalars); if these have `skipped`, 1
      marks a step that was left out as not finite, and `patience` of them in a row raise Diverged.
    batches: step -> this process's rows as numpy: a function of the step alone.
    evaluate: (step, state) -> (state, values), before the first step, every `evaluate_every` steps
      and after the last.
    folder, inputs: where checkpoints and metrics go, and what decides the result (checkpoint.py).
    keep, best: checkpoints that stay: the latest `keep`, and the one of least value `best`.

    Killed at any moment, the same call goes on from the last checkpoint and ends with the same
    state. SIGTERM in any process saves a checkpoint in all and exits with code 143.
    """
    with contextlib.ExitStack() as stack:
        place = folder / "checkpoints"
        checkpoints = stack.enter_context(open_checkpoints(place, inputs, keep, best))
        start, state = checkpoints.restore(abstract(state)) or (0, state)
        if start == steps:
            return state
        metrics = Metrics(folder, name, start=start, steps=steps, write=processes.is_first())
        stack.callback(metrics.close)
        told_to_stop = stack.enter_context(_terminated())
        late = _Late(metrics, patience)
        if start:
            metrics.say(f"{name}: going on from the checkpoint of step {start}")

        def measure(done: int, state: Any) -> tuple[Any, dict[str, Any] | None]:
            if evaluate is None or (done % evaluate_every and done != steps):
                return state, None
            late.settle()
            state, values = evaluate(done, state)
            metrics.log(done, values)
            return state, values

        if not start:
            state, _ = measure(0, state)
        for step, batch in prefetch(batches, start, steps):
            state, out = step_fn(state, mesh.shard_batch(batch))
            late.settle()
            late.step = (step, out, processes.vote(told_to_stop.is_set()))
            done = step + 1
            state, figures = measure(done, state)
            if late.stop or done % checkpoint_every == 0 or done == steps:
                late.settle()
                checkpoints.save(done, state, figures)
            if late.stop:
                metrics.say(f"told to stop: saving step {done}; the same command goes on from here")
                raise SystemExit(128 + signal.SIGTERM)
    return state


@dataclasses.dataclass
class _Late:
    """What the last step gave, read when the next one runs: so nothing waits for it."""

    metrics: Metrics
    patience: int
    step: tuple[int, dict[str, jax.Array], Any] | None = None
    bad: int = 0  # steps in a row that were not finite
    stop: bool = False  # a process was told to stop; all know it at the same step

    def settle(self) -> None:
        """Reads and records what there is. Raises Diverged at the last bad step of `patience`."""
        if self.step is None:
            return
        (step, out, vote), self.step = self.step, None
        values = {k: float(v) for k, v in out.items()}
        self.metrics.log(step, values)
        self.stop = self.stop or bool(vote)
        self.bad = self.bad + 1 if values.get("skipped") else 0
        if self.bad >= self.patience:
            raise Diverged(
                f"{self.bad} steps in a row had a loss or gradient that is not finite, the last of "
                f"them step {step}: lower the learning rate, lengthen the warm-up or check the data"
            )


class _terminated:
    """While open, SIGTERM sets an event instead of ending the process."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self._old = None
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, lambda *_: event.set())
        return event

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
