"""The loop both stages run: prefetched batches, late metrics, checkpoints, evaluation, signals."""

import pathlib
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from e3jax import mesh
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
) -> Any:
    """Runs steps [last checkpoint, steps) and returns the final state.

    step_fn: jitted (state, device batch) -> (state, float32 scalars); if these have `skipped`, 1
      marks a step that was left out as not finite, and `patience` of them in a row raise Diverged.
    batches: step -> this process's rows as numpy: a function of the step alone.
    evaluate: (step, state) -> (state, values), before the first step, every `evaluate_every` steps
      and after the last.
    folder, inputs: where checkpoints and metrics go, and what decides the result (checkpoint.py).

    Killed at any moment, the same call goes on from the last checkpoint and ends with the same
    state. SIGTERM saves a checkpoint and exits with code 143.
    """
    first_process = jax.process_index() == 0
    with open_checkpoints(folder / "checkpoints", inputs) as checkpoints:
        found = checkpoints.restore(abstract(state))
        start = 0
        if found is not None:
            start, state = found
        if start == steps:
            return state
        metrics = Metrics(folder, name, start=start, steps=steps, write=first_process)
        try:
            with _terminated() as told_to_stop:
                if start:
                    metrics.say(f"{name}: going on from the checkpoint of step {start}")
                state = _loop(
                    step_fn, state, batches, start, steps, checkpoints, metrics,
                    checkpoint_every, evaluate, evaluate_every, patience, told_to_stop,
                )  # fmt: skip
        finally:
            metrics.close()
    return state


def _loop(
    step_fn: Step,
    state: Any,
    batches: Callable[[int], Any],
    start: int,
    steps: int,
    checkpoints: Any,
    metrics: Metrics,
    checkpoint_every: int,
    evaluate: Evaluate | None,
    evaluate_every: int,
    patience: int,
    told_to_stop: threading.Event,
) -> Any:
    late: tuple[int, dict[str, jax.Array], dict[str, Any]] | None = None
    bad = 0

    def settle() -> None:
        """Reads the metrics of the step before: by now they are there, and nothing waits."""
        nonlocal late, bad
        if late is None:
            return
        step, out, more = late
        values = {k: float(v) for k, v in out.items()} | more
        late = None
        metrics.log(step, values)
        bad = bad + 1 if values.get("skipped") else 0
        if bad >= patience:
            raise Diverged(
                f"{bad} steps in a row had a loss or gradient that is not finite, the last of them "
                f"step {step}: lower the learning rate, lengthen the warm-up or check the data"
            )

    for step, batch in prefetch(batches, start, steps):
        more: dict[str, Any] = {}
        if evaluate is not None and step % evaluate_every == 0:
            settle()
            state, more = evaluate(step, state)
        state, out = step_fn(state, mesh.shard_batch(batch))
        settle()
        late = (step, out, more)
        done = step + 1
        stop = told_to_stop.is_set()
        if stop or done % checkpoint_every == 0 or done == steps:
            settle()
            if done == steps and evaluate is not None:
                state, values = evaluate(done, state)
                metrics.log(done, values)
            checkpoints.save(done, state)
        if stop:
            metrics.say(f"told to stop: saving step {done}; the same command goes on from here")
            raise SystemExit(128 + signal.SIGTERM)
    return state


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
