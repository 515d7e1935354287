"""The configuration of a run: frozen dataclasses whose fields carry their own help text.

`--help`, validation (configure.py) and the code share this one source.
"""

import dataclasses

import pydantic
from pydantic import Field

from e3jax.config.distill import PLAIN, Distill, Optimizer, Train
from e3jax.config.inputs import Data, Mesh, Model, Source
from e3jax.config.results import Bench, Compare, Evaluate, Export, Selector, Sweep
from e3jax.config.search import KEEP, Search, Target
from e3jax.config.strict import strict

__all__ = [
    "KEEP",
    "PLAIN",
    "Bench",
    "Compare",
    "Data",
    "Distill",
    "Evaluate",
    "Export",
    "Mesh",
    "Model",
    "Optimizer",
    "Run",
    "Search",
    "Selector",
    "Source",
    "Sweep",
    "Target",
    "Train",
]


@strict
class Run:
    out: str = Field(description="run folder")
    seed: int = Field(default=0, ge=0, lt=2**32, description="decides every random draw")
    deterministic: bool = Field(default=False, description="bitwise repeatable on GPU, slower")
    keep_checkpoints: int = Field(default=2, ge=1, description="that stay, beside the best one")
    wandb: str | None = Field(default=None, description="Weights & Biases project, if installed")
    model: Model = Field(default=Model(), description="the model")
    mesh: Mesh = Field(default=Mesh(), description="devices")
    data: Data = Field(default=Data(), description="data")
    search: Search = Field(default=Search(), description="stage 1")
    distill: Distill = Field(default=Distill(), description="stage 2")
    train: Train = Field(default=Train(), description="plain training (the `train` command)")
    export: Export = Field(default=Export(), description="safetensors out")
    evaluate: Evaluate = Field(default=Evaluate(), description="figures")
    compare: Compare = Field(default=Compare(), description="selectors (the `compare` command)")
    bench: Bench = Field(default=Bench(), description="speed (the `bench` command)")
    sweep: Sweep = Field(default=Sweep(), description="several keeps (the `sweep` command)")

    @pydantic.model_validator(mode="after")
    def _teacher_of_candidates(self) -> "Run":
        if self.search.candidates > 1 and self.distill.teacher != "online":
            raise ValueError(
                f"search.candidates={self.search.candidates} recovers them with the teacher in the "
                f"step: it needs distill.teacher=online, not {self.distill.teacher}"
            )
        return self

    @property
    def adapts(self) -> bool:
        """Whether a search of this run trains all layers for a while."""
        return self.search.adapt_steps > 0 and self.distill.mask is None

    @property
    def adaptation(self) -> Distill:
        """What `search.adapt_steps` trains all layers by: the recovery's recipe but for what is of
        one student alone; nothing fitted or frozen, uniform weights."""
        steps = max(1, self.search.adapt_steps)
        return dataclasses.replace(
            self.distill,
            steps=steps,
            mask=None,
            teacher="online",
            weight="uniform",
            fit=0,
            freeze=False,
            evaluate_every=steps,
        )
