"""A row of a run's table, and where what lies behind it is. Without jax."""

import dataclasses
import pathlib

from e3jax import files


@dataclasses.dataclass(frozen=True)
class Row:
    """One model's figures."""

    model: str
    layers: int
    parameters: int
    perplexity: float
    kl: float  # KL(dense || model), nats a token
    agreement: float  # top-1, share of tokens
    exact_match: float | None  # share of problems, None without test problems
    problems: int
    tokens: int  # spent to get here, by masked or student models
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)  # of evaluate.tasks
    samples: int = 0  # drawn answers a problem, of which exact_match is pass@1; 0: a greedy one
    interval: list[float] | None = None  # 95 %, of exact_match, over problems

    @property
    def solved(self) -> str:
        """What exact_match is called."""
        return "pass@1" if self.samples else "exact match"

    def share(self, *, ends: bool) -> str:
        """exact_match in percent, with its interval where `ends` are asked for, as text."""
        if self.exact_match is None:
            return "-"
        text = f"{100 * self.exact_match:.1f} %"
        if ends and self.interval:
            text += " ({:.1f} to {:.1f})".format(*(100 * x for x in self.interval))
        return text

    def shown(self) -> dict[str, str]:
        """The row as text, for tables."""
        return {
            "model": self.model,
            "layers": str(self.layers),
            "parameters": f"{self.parameters / 1e6:,.1f} M",
            self.solved: self.share(ends=self.samples > 0),
            "KL": f"{self.kl:z.4f}",
            "top-1": f"{100 * self.agreement:.1f} %",
            "perplexity": f"{self.perplexity:.3f}",
            "tokens": f"{self.tokens / 1e6:,.2f} M",
        } | {name: f"{value:.4f}" for name, value in self.tasks.items()}


def beside(folder: pathlib.Path, model: str, kind: str) -> pathlib.Path:
    """The file of a row, `json`, and those beside it: `answers.jsonl`, `windows.json` and others.

    folder: `evaluate`.
    """
    return folder / f"{pathlib.PurePath(model.replace(' ', '-')).name}.{kind}"


def read(folder: pathlib.Path) -> list[Row]:
    """The table: the dense model, ours raw and recovered, then baselines. Empty before all are
    measured."""
    path = folder / "results.json"
    return [Row(**fields) for fields in files.read_json(path)] if path.is_file() else []
