"""Stage 2, and plain training, which is the same loop."""

import dataclasses
from typing import Any, Literal

import pydantic
from pydantic import Field

from e3jax.config.strict import Positive, strict


@strict
class Optimizer:
    lr: float = Field(default=1e-4, gt=0, description="peak learning rate")
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="share of the steps with rising learning rate"
    )
    final: float = Field(
        default=0.1, ge=0, le=1, description="last learning rate as a share of the peak (cosine)"
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="Adam")
    b2: float = Field(default=0.95, ge=0, lt=1, description="Adam")
    eps: float = Field(default=1e-8, gt=0, description="Adam")
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only")
    clip: float = Field(default=1.0, gt=0, description="global gradient norm")


@strict
class Distill:
    mask: str | None = Field(default=None, description="mask file; none = this run's search")
    steps: int = Field(default=1000, ge=0, description="optimiser steps")
    batch: int = Field(default=64, ge=1, description="windows a step")
    microbatch: int | None = Field(
        default=None, ge=1, description="windows a forward pass; divides batch"
    )
    optimizer: Optimizer = Field(default=Optimizer(), description="")
    weight: Literal["teacher", "student", "joint", "uniform"] = Field(
        default="student", description="entropy that weighs a token; the paper's is the teacher's"
    )
    weight_clip: tuple[Positive, Positive] = Field(
        default=(0.2, 5.0), description="least and greatest token weight"
    )
    weight_power: float = Field(
        default=1.0, ge=0, description="sharpness: w = (H / mean H) ** power"
    )
    divergence: Literal["forward_kl", "reverse_kl", "skew_kl"] = Field(
        default="forward_kl", description="teacher || student and its kin"
    )
    skew: float = Field(default=0.1, gt=0, lt=1, description="lambda of skew_kl")
    hidden: float = Field(
        default=30.0,
        ge=0,
        description="weight of the distance between the layers' residual streams and the dense"
        " model's; 0 where the teacher is not online",
    )
    fit: int = Field(
        default=0, ge=0, description="windows that mlps are fitted to by least squares at first"
    )
    freeze: bool = Field(
        default=False,
        description="do not train the layers before the first one removed, but the last of them,"
        " nor the embeddings: both models compute them once",
    )
    float8: bool = Field(
        default=False,
        description="the dense model's attention and mlps in float8, for GPUs that have it",
    )
    temperature: float = Field(default=1.0, gt=0, description="T; the loss carries T**2")
    ce: float = Field(
        default=0.0, ge=0, le=1, description="share of the loss that is next-token cross-entropy"
    )
    teacher: Literal["online", "cache", "none"] = Field(
        default="online",
        description="full-vocabulary teacher in the step, its stored top-k, or none (plain"
        " fine-tuning)",
    )
    top_k: int = Field(default=10, ge=1, description="stored logits a token")
    cache: str | None = Field(
        default=None, description="where they are: folder or gs://bucket/path; none = in `out`"
    )
    tail: Literal["renormalise", "drop", "bucket"] = Field(
        default="bucket", description="what stands for the outcomes beyond top_k"
    )
    chunk: int = Field(default=2048, ge=1, description="tokens of a device whose logits exist")
    evaluate_every: int = Field(default=100, ge=1, description="steps between held-out figures")
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    patience: int = Field(default=10, ge=1, description="non-finite steps in a row that stop it")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _layers_of_the_teacher(cls, given: Any) -> Any:
        fields = given if isinstance(given, dict) else given.kwargs or {}
        return {"hidden": 0.0} | fields if fields.get("teacher", "online") != "online" else given

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Distill":
        if self.batch % (self.microbatch or 1):
            raise ValueError(f"microbatch={self.microbatch} does not divide batch={self.batch}")
        if self.teacher == "cache" and self.divergence != "forward_kl" and self.tail != "bucket":
            raise ValueError(
                f"divergence={self.divergence} with a cached teacher needs tail=bucket"
            )
        if (self.hidden or self.freeze) and self.teacher != "online":
            said = f"hidden={self.hidden:g}" if self.hidden else "freeze=true"
            raise ValueError(
                f"{said} needs the teacher's layers: teacher=online, not {self.teacher}"
            )
        if self.float8 and (self.freeze or self.teacher != "online"):
            raise ValueError(
                "float8=true is of a dense model that only teaches: teacher=online, freeze=false"
            )
        return self

    @property
    def together(self) -> int:
        """Windows of a forward pass."""
        return self.microbatch or self.batch

    def facts(self) -> dict[str, Any]:
        """All fields by name, for what is kept to tell by which recipe it was made; those that came
        later only where they are set, so that what was made before is still good."""
        fields = dataclasses.asdict(self)
        return {key: value for key, value in fields.items() if value or key not in LATER}


LATER = ("float8",)
PLAIN: dict[str, Any] = {"teacher": "none", "weight": "uniform", "ce": 1.0}


@strict
class Train:
    config: str | None = Field(
        default=None,
        description="config.json to start from scratch with; none = continue model.path",
    )
    tokenizer: str | None = Field(default=None, description="tokenizer folder, with config")
    recipe: Distill = Field(default=Distill(**PLAIN), description="")

    @pydantic.field_validator("recipe", mode="before")
    @classmethod
    def _plain(cls, recipe: Any) -> Any:
        return PLAIN | recipe if isinstance(recipe, dict) else recipe
