"""Measured speed of a run's models: bench/bench.json, its table, its CSV. Without jax."""

import csv
import dataclasses
import io
import pathlib
from typing import Any

from e3jax import files

PHASES = ("prefill", "decode", "end to end")
MODELS = ("dense", "pruned")
WIDTH = 21  # of a column


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model in an engine, with so many rows at a time."""

    engine: str
    model: str  # one of MODELS
    batch: int
    # Phase -> tokens a second, median; spread, as a share. A phase in the noise is missing.
    rates: dict[str, tuple[float, float]]
    memory: int | None  # bytes, the most that its process had
    error: str | None = None  # in place of the rest

    def shown(self, phase: str) -> str:
        """The rate and half of its range, as text."""
        if phase not in self.rates:
            return "in the noise"
        rate, spread = self.rates[phase]
        return f"{rate:,.1f} ±{50 * spread:5.1f} %"


@dataclasses.dataclass(frozen=True)
class Speed:
    """What `bench` found."""

    device: str
    on_host: bool  # memory is the process's resident one, libraries included
    dtype: str
    prompt: int  # tokens
    new_tokens: int
    repeats: int
    layers: tuple[int, int]  # dense, pruned
    ideals: dict[str, dict[str, float]]  # batch -> phase -> how much less work the pruned model is
    versions: dict[str, str]
    arms: list[Arm]

    @property
    def batches(self) -> list[int]:
        return list(dict.fromkeys(arm.batch for arm in self.arms))

    def of(self, batch: int) -> list[tuple[str, list[Arm]]]:
        """The engines with so many rows, and their arms, dense first."""
        here = [arm for arm in self.arms if arm.batch == batch]
        engines = dict.fromkeys(arm.engine for arm in here)
        return [(name, [arm for arm in here if arm.engine == name]) for name in engines]

    def faster(self, arms: list[Arm], phase: str) -> float | None:
        """Pruned by dense, where both were measured."""
        rates = [arm.rates[phase][0] for arm in arms if phase in arm.rates]
        return rates[1] / rates[0] if len(rates) == 2 else None

    @property
    def ideal(self) -> float:
        """Layers before by layers after."""
        return self.layers[0] / self.layers[1]

    @property
    def head(self) -> str:
        """What was measured, in a line or two."""
        return (
            f"{self.layers[0]} -> {self.layers[1]} layers on one {self.device}, {self.dtype}: "
            f"prompts of {self.prompt} tokens, answers of {self.new_tokens};\ntokens a second, "
            f"median of {self.repeats}, and ± half of their range"
        )


def read(folder: pathlib.Path) -> Speed | None:
    """What `bench` left in its folder; None where it was not run."""
    path = folder / "bench.json"
    if not path.is_file():
        return None
    fields: dict[str, Any] = files.read_json(path)
    fields["layers"], fields["arms"] = tuple(fields["layers"]), [Arm(**a) for a in fields["arms"]]
    return Speed(**fields)


def write(folder: pathlib.Path, speed: Speed) -> None:
    """bench.json, bench.csv and bench.txt, the table."""
    files.write_json(folder / "bench.json", speed)
    files.write_text(folder / "bench.csv", as_csv(speed))
    files.write_text(folder / "bench.txt", render(speed) + "\n")


def render(speed: Speed) -> str:
    """The table, less than 100 columns wide."""
    lines = [speed.head]
    memory = "resident" if speed.on_host else "memory"
    for batch in speed.batches:
        lines += ["", _line(rows(batch), [*PHASES, memory]), "-" * (20 + 3 * WIDTH + 12)]
        for engine, arms in speed.of(batch):
            for arm in arms:
                name = f"{engine} {arm.model}"
                if arm.error:
                    lines.append(f"{name:<20}{arm.error}"[:99])
                    continue
                lines.append(_line(name, [*map(arm.shown, PHASES), _gib(arm.memory)]))
            if len([arm for arm in arms if not arm.error]) == 2:
                shares = [_times(speed.faster(arms, phase)) for phase in PHASES]
                lines.append(_line("  pruned / dense", shares))
        lines.append(_line("ideal, by layers", [_times(speed.ideal)] * 3))
        work = [_times(speed.ideals[str(batch)].get(phase)) for phase in PHASES]
        lines.append(_line("ideal, by work", work))
    return "\n".join(lines)


def as_csv(speed: Speed) -> str:
    """A line an arm."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    columns = [f"{phase} {what}" for phase in PHASES for what in ("tokens/s", "spread")]
    out.writerow(["engine", "model", "batch", *columns, "memory bytes", "error"])
    for arm in speed.arms:
        found = [value for phase in PHASES for value in arm.rates.get(phase, ("", ""))]
        memory = "" if arm.memory is None else arm.memory
        out.writerow([arm.engine, arm.model, arm.batch, *found, memory, arm.error or ""])
    return text.getvalue()


def rows(batch: int) -> str:
    """1 row, 8 rows."""
    return f"{batch} row{'s' * (batch > 1)}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _line(name: str, cells: list[str]) -> str:
    widths = [WIDTH] * 3 + [12]
    return (f"{name:<20}" + "".join(f"{x:>{w}}" for x, w in zip(cells, widths))).rstrip()


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"
