"""The table of a run: every model measured the same way, once."""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from e3jax import files, job
from e3jax.evaluate.exact import Answer, solve
from e3jax.evaluate.figures import make_figures
from e3jax.job import Job
from e3jax.models import decoder
from e3jax.models.decoder import Params

log = logging.getLogger(__name__)


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

    def shown(self) -> dict[str, str]:
        """The row as text, for tables."""
        exact = "-" if self.exact_match is None else f"{100 * self.exact_match:.1f} %"
        return {
            "model": self.model,
            "layers": str(self.layers),
            "parameters": f"{self.parameters / 1e6:,.1f} M",
            "exact match": exact,
            "KL": f"{self.kl:.4f}",
            "top-1": f"{100 * self.agreement:.1f} %",
            "perplexity": f"{self.perplexity:.3f}",
            "tokens": f"{self.tokens / 1e6:,.2f} M",
        }
