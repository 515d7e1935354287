"""What is written and measured."""

import re
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from e3jax.config.strict import strict

# Published rules, all in selectors/registry.py.
Selector = Literal[
    "shortgpt", "shortgpt_released", "minitron", "ppl", "kl", "sleb", "greedy_kl", "taylor",
    "taylor_plus", "magnitude", "streamline", "angular", "angular_released", "tail", "deepest",
    "laco", "laco_released", "evopress", "evopress_full", "random",
]  # fmt: skip


@strict
class Export:
    dtype: Literal["source", "bfloat16", "float16", "float32"] = Field(
        default="source", description="dtype written; source = the checkpoint's own"
    )
    shard_gb: float = Field(default=5.0, gt=0, le=5, description="greatest shard, 10**9 bytes")
    raw: bool = Field(default=False, description="export the un-recovered model too")


@strict
class Evaluate:
    rows: int | None = Field(default=None, ge=1, description="test problems; none = all")
    batch: int = Field(default=64, ge=1, description="problems decoded together")
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer")
    answer: str = Field(
        default=r"answer : (\S+)",
        description="regular expression whose first group is the answer; its last match counts",
    )
    grader: Literal["regex", "math_verify"] = Field(
        default="regex",
        description="regex: right is whose text by `answer` is the gold one's; math_verify: whose"
        " last \\boxed{} equals it as mathematics (needs math-verify)",
    )
    samples: int = Field(
        default=1, ge=1, description="answers to each problem; pass@1 is their mean"
    )
    temperature: float = Field(default=0.0, ge=0, description="of sampling; 0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus sampled from; 1 = all")
    top_k: int = Field(default=0, ge=0, lt=2**31, description="tokens sampled from; 0 = all")
    seed: int = Field(default=0, ge=0, description="of sampling; each answer has its own of it")
    baselines: tuple[Selector, ...] = Field(
        default=("shortgpt",), description="selectors given the same recovery"
    )
    loss_curve: bool = Field(default=True, description="loss after each successive removal")
    tasks: tuple[str, ...] = Field(
        default=(), description="lm-evaluation-harness tasks for every row: names, or YAML files"
    )
    task_path: str | None = Field(default=None, description="a folder of more such tasks")

    @pydantic.field_validator("answer")
    @classmethod
    def _has_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError("expected one group, such as answer : (\\S+)")
        return pattern

    @pydantic.model_validator(mode="after")
    def _greedy(self) -> "Evaluate":
        if self.temperature == 0:
            for name, default in (("samples", 1), ("top_p", 1.0), ("top_k", 0)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name}={value} is of sampling: it needs a temperature above 0, such as"
                        " evaluate.temperature=0.6"
                    )
        return self


@strict
class Compare:
    selectors: tuple[Literal["e3"] | Selector, ...] = Field(
        default=("e3", "shortgpt", "sleb", "greedy_kl", "evopress", "random"),
        min_length=1,
        description="who chooses; differences are from the first",
    )
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="each with a calibration sample of its own"
    )
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="through masked models, that a selector may spend; none = as the search may",
    )
    recover: bool = Field(default=True, description="recover each choice by `distill`, and measure")

    @pydantic.model_validator(mode="after")
    def _distinct(self) -> "Compare":
        for name, values in (("selectors", self.selectors), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has one twice: {list(values)}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds: {min(self.seeds)} is negative")
        return self


@strict
class Bench:
    batch: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(1, 8), min_length=1, description="rows at a time, each count measured"
    )
    prompt: int = Field(default=128, ge=1, description="tokens of each prompt, random ones")
    new_tokens: int = Field(default=64, ge=2, description="tokens of each answer")
    repeats: int = Field(default=5, ge=2, description="measurements, of which the median is shown")


@strict
class Sweep:
    keep: tuple[Annotated[int | float, Field(gt=0)], ...] = Field(
        default=(0.9, 0.75, 0.6),
        min_length=1,
        description="in place of search.keep, one run each",
    )
