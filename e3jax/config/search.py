"""Stage 1: how many layers are kept, and how they are searched for."""

from typing import Literal

import pydantic
from pydantic import Field

from e3jax.config.strict import Positive, strict

KEEP = 0.75  # of the layers, where nothing says how many


@strict
class Target:
    params: str | float | None = Field(default=None, description="parameters at most: 6B, 800M")
    memory: str | float | None = Field(default=None, description="weights at most: 24GiB, 13GB")
    speedup: Positive | None = Field(default=None, description="ideal speed-up at least: 1.33")


@strict
class Search:
    keep: int | Positive | None = Field(
        default=None, gt=0, description="layers kept: a count, or a share below 1; none = 0.75"
    )
    target: Target = Field(default=Target(), description="")
    steps: int = Field(default=200, ge=1, description="search steps")
    batch: int = Field(default=16, ge=1, description="windows a step; each draws its own masks")
    masks_per_window: int = Field(
        default=1, ge=1, description="masks of a window; the dense model runs once for all of them"
    )
    microbatch: int | None = Field(
        default=None, ge=1, description="windows a forward pass; divides batch"
    )
    init: Literal["kl", "shortgpt", "zeros", "random"] = Field(
        default="kl", description="start of theta: a selector's score of each layer, or none"
    )
    start: str | None = Field(
        default=None,
        description="mask file of a search whose theta and K this one goes on from; none = init",
    )
    init_form: Literal["log", "rank"] = Field(
        default="log", description="importance -> theta: zscore(log s) or zscore(rank)"
    )
    init_scale: float = Field(
        default=2.0, ge=0, description="spread of the start in Gumbel standard deviations (1.28)"
    )
    init_windows: int = Field(default=16, ge=1, description="windows that measure the importance")
    estimator: Literal["score", "straight_through", "mixed"] = Field(
        default="mixed",
        description="gradient of theta: score function, the paper's straight-through, or their sum",
    )
    relaxation: Literal["threshold", "khot", "softmax"] = Field(
        default="threshold", description="backward of straight_through"
    )
    masks: Literal["row", "batch"] = Field(
        default="row", description="masks of its own for each row, or one mask a batch"
    )
    tau: tuple[Positive, Positive] = Field(
        default=(4.0, 0.3), description="relaxation temperature, first and last"
    )
    curriculum: float = Field(
        default=0.3, ge=0, le=1, description="share of the steps over which K falls from L"
    )
    loss: Literal["kl", "ce"] = Field(
        default="kl", description="KL to the dense model, or next-token cross-entropy"
    )
    lr: float = Field(default=0.1, gt=0, description="learning rate of theta (Adam)")
    protect: tuple[int, ...] = Field(default=(), description="layers never removed")
    force: tuple[int, ...] = Field(default=(), description="layers always removed")
    score_every: int = Field(
        default=20, ge=1, description="steps between held-out scores of the current answer"
    )
    score_windows: int = Field(default=16, ge=1, description="held-out windows a score")
    refine: int = Field(
        default=200,
        ge=0,
        description="answers proposed and scored at the end: so many times score_windows are spent",
    )
    refine_windows: int = Field(
        default=256, ge=1, description="held-out windows that those scores are on, at most"
    )
    adapt_steps: int = Field(
        default=0,
        ge=0,
        description="steps before them in which weights learn to do without layers, for the scores",
    )
    candidates: int = Field(
        default=1,
        ge=1,
        description="best answers recovered for candidate_steps before one is chosen; 1: none is",
    )
    candidate_steps: int = Field(default=50, ge=1, description="steps of those recoveries")
    checkpoint_every: int = Field(default=50, ge=1, description="steps between checkpoints")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Search":
        # A row's baseline is the loss of the other rows' masks.
        few = self.batch * self.masks_per_window < 2
        if self.estimator != "straight_through" and (self.masks == "batch" or few):
            raise ValueError(
                f"estimator={self.estimator} compares masks: it needs masks=row and batch of 2 or"
                f" more, or masks_per_window, not masks={self.masks} and batch={self.batch}"
            )
        if self.adapt_steps and not self.refine:
            raise ValueError(
                f"adapt_steps={self.adapt_steps} is for the scores of refine: it needs refine above"
                " 0, such as 36"
            )
        if self.masks == "batch" and self.masks_per_window > 1:
            raise ValueError(
                f"masks=batch is one mask for all windows: masks_per_window={self.masks_per_window}"
                " needs masks=row"
            )
        if self.batch % (self.microbatch or 1):
            raise ValueError(f"microbatch={self.microbatch} does not divide batch={self.batch}")
        return self

    @property
    def together(self) -> int:
        """Windows of a forward pass."""
        return self.microbatch or self.batch
