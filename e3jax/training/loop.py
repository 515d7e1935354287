"""The loop both stages run: prefetched batches, late metrics, checkpoints, evaluation, signals."""

import contextlib
import dataclasses
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from e3jax import mesh, notice, processes
from e3jax.data.batches import prefetch
from e3jax.errors import Diverged
from e3jax.training.checkpoint import open_checkpoints
from e3jax.training.metrics import Metrics

log = logging.getLogger(__name__)

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
Evaluate = Callable[[int, Any], tuple[Any, dict[str, Any]]]


def fit(
    name: str,
    step_fn: Step,
    make_state: Callable[[], Any],
    batches: Callable[[int], Any],
    *,
    like: Any,
    steps: int,
    folder: pathlib.Path | None,
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
    make_state: the state before the first step, asked for only where there is no checkpoint: so
      that neither it nor what it is made of lies beside the one that is read.
    batches: step -> this process's rows as numpy: a function of the step alone.
    like: ShapeDtypeStructs of the state with its shardings, for what is read from a checkpoint.
    evaluate: (step, state) -> (state, values), before the first step, every `evaluate_every` steps
      and after the last.
    folder, inputs: where checkpoints and metrics go, and what decides the result (checkpoint.py).
      None: there is no checkpoint, and no record stays.
    keep, best: checkpoints that stay: the latest `keep`, and the one of least value `best`, for
      which there is one after each evaluation too.

    Killed at any moment, the same call goes on from the last checkpoint and ends with the same
    state. A notice to stop (notice.py) saves a checkpoint in all processes and exits with code 143,
    after the step that runs or in the midst of an evaluation, which is then done on restart.
    """
    with notice.held(), contextlib.ExitStack() as stack:
        checkpoints = None
        if folder is None:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = folder / "checkpoints"
            checkpoints = stack.enter_context(open_checkpoints(place, inputs, keep, best))

        def save(step: int, state: Any, *, due: bool, figures: Any = None) -> None:
            if checkpoints is not None:
                checkpoints.save(step, _Kept.of(state, due=due), figures)

        with notice.released():
            found = checkpoints and checkpoints.restore(_Kept.like(like))
            start, kept = found or (0, None)
            state, due = (make_state(), True) if kept is None else (kept.state, bool(kept.due))
        if start == steps and not due:
            return state
        metrics = Metrics(
            folder, name, start=start, steps=steps, write=processes.is_first(), due=due
        )
        stack.callback(metrics.close)
        late = _Late(metrics, patience)
        if start:
            log.info("%s: going on from the checkpoint of step %d", name, start)

        def measure(done: int, state: Any) -> tuple[Any, dict[str, Any] | None]:
            if evaluate is None or (done % evaluate_every and done != steps):
                return state, None
            late.settle()
            try:
                with notice.breakable() if done > start else notice.released():
                    measured, values = evaluate(done, state)
            except SystemExit:
                if done > start:
                    save(done, state, due=True)
                log.info("told to stop while step %d is measured; the same command goes on", done)
                raise
            metrics.log(done, values)
            return measured, values

        if due:
            state, _ = measure(start, state)
        stream = stack.enter_context(contextlib.closing(prefetch(batches, start, steps)))
        ahead = _Waited(stream)
        for step, batch in ahead:
            with notice.released() if step == start else contextlib.nullcontext():  # it compiles
                state, out = step_fn(state, mesh.shard_batch(batch))
            late.settle()
            done = step + 1
            late.step = (step, out, notice.vote(done))
            state, figures = measure(done, state)
            judged = figures is not None and best is not None  # perhaps the best of all
            if late.stop or judged or done % checkpoint_every == 0 or done == steps:
                late.settle()
                save(done, state, due=False, figures=figures)
            if late.stop:
                log.info("told to stop: saving step %d; the same command goes on from here", done)
                raise SystemExit(notice.CODE)
        log.info("%s: %.1f %% of the time waited for data", name, 100 * ahead.share())
    return state


@flax.struct.dataclass
class _Kept:
    """What a checkpoint holds."""

    state: Any
    due: jax.Array  # uint32: 1 where the evaluation after this step was broken off

    @classmethod
    def of(cls, state: Any, *, due: bool) -> "_Kept":
        return cls(state, mesh.replicate(jnp.uint32(due)))

    @classmethod
    def like(cls, state: Any) -> "_Kept":
        return cls(state, jax.ShapeDtypeStruct((), jnp.uint32, sharding=mesh.sharding(())))


class _Waited:
    """Passes on (step, batch), and knows the share of the time that went by waiting for them."""

    def __init__(self, items: Iterator[tuple[int, Any]]) -> None:
        self._items, self._begun, self._waited = items, time.monotonic(), 0.0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        before = time.monotonic()
        item = next(self._items)
        self._waited += time.monotonic() - before
        return item

    def share(self) -> float:
        return self._waited / max(time.monotonic() - self._begun, 1e-9)


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
