"""The configuration of a run: frozen dataclasses whose fields carry their own help text.

`--help`, validation (configure.py) and the code share this one source.
"""

import re
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import Field

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def strict(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks its values and refuses unknown fields."""
    forbid = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
    return cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=forbid)(cls))


Positive = Annotated[float, Field(gt=0)]
# Published rules, all in selectors/registry.py.
Selector = Literal[
    "shortgpt", "shortgpt_released", "minitron", "ppl", "kl", "sleb", "greedy_kl", "taylor",
    "taylor_plus", "magnitude", "streamline", "angular", "angular_released", "tail", "deepest",
    "laco", "laco_released", "evopress", "evopress_full", "random",
]  # fmt: skip
Rows = Annotated[str, Field(pattern=r"^-?\d*:-?\d*$")]


@strict
class Model:
    path: str = Field(
        default="demo", description="folder, Hugging Face hub id, or `demo` (the bundled model)"
    )
    revision: str | None = Field(default=None, description="hub revision")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="compute dtype")
    remat: Literal["none", "elementwise", "selective", "layer"] = Field(
        default="layer",
        description="what backward recomputes: nothing, no product, mostly the mlp, or each layer",
    )


@strict
class Mesh:
    replica: int = Field(default=1, ge=1, description="data-parallel replicas (between slices)")
    data: int = Field(default=-1, ge=-1, description="FSDP size; -1 = all remaining devices")
    model: int = Field(default=1, ge=1, description="tensor-parallel size")


@strict
class Source:
    path: str = Field(description="file (jsonl, json, parquet, text; .gz too), folder or hub id")
    name: str | None = Field(default=None, description="hub configuration name")
    split: str = Field(default="train", description="split")
    rows: tuple[Rows, ...] = Field(
        default=(), description="Python slices of the rows used; empty = all"
    )
    streaming: bool = Field(default=False, description="read lazily from the hub")
    format: Literal["auto", "text", "completion", "messages", "chat"] = Field(
        default="auto",
        description="which fields are read; auto looks at the columns; chat = prompt and completion"
        " as a user's and an assistant's turn of the chat template",
    )
    text: str = Field(default="text", description="field of plain text")
    prompt: str = Field(default="prompt", description="field of the prompt")
    completion: str = Field(default="completion", description="field of the completion")
    messages: str = Field(default="messages", description="field of a list of {role, content}")
    answer: str = Field(default="answer", description="field of the checkable answer (test data)")
    separator: str = Field(default=" ", description="stands between prompt and completion")


@strict
class Data:
    train: tuple[Source, ...] = Field(default=(), description="calibration and recovery data")
    held_out: tuple[Source, ...] = Field(
        default=(), description="scores the search and the student; never trained on"
    )
    test: tuple[Source, ...] = Field(default=(), description="problems with a checkable answer")
    measure: tuple[Source, ...] = Field(
        default=(), description="text for perplexity and KL; none = test"
    )
    window: int = Field(default=4096, ge=8, description="tokens a row of a batch")
    pack: bool = Field(
        default=True, description="several documents a window, isolated by segment ids"
    )
    loss_on: Literal["all", "completion"] = Field(
        default="all", description="tokens that carry loss"
    )
    long_rows: Literal["split", "drop"] = Field(
        default="split", description="what becomes of documents longer than the window"
    )
    decontaminate: tuple[str, ...] = Field(
        default=("math-500", "gsm8k"),
        description="evaluation sets (known names or jsonl files) whose questions may not occur in"
        " train",
    )
    cache: str = Field(default="~/.cache/e3jax/tokens", description="folder of tokenised windows")


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
    steps: int = Field(default=500, ge=1, description="search steps")
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
    swaps: int = Field(
        default=0,
        ge=0,
        description="exchanges of two layers at the end: so many times score_windows are spent",
    )
    swap_windows: int = Field(
        default=64, ge=1, description="held-out windows that decide an exchange, at most"
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
        default="teacher", description="entropy that weighs a token"
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
        default=0.0,
        ge=0,
        description="weight of the distance between the layers' residual streams and the dense"
        " model's",
    )
    fit: int = Field(
        default=0, ge=0, description="windows that mlps are fitted to by least squares at first"
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

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Distill":
        if self.batch % (self.microbatch or 1):
            raise ValueError(f"microbatch={self.microbatch} does not divide batch={self.batch}")
        if self.teacher == "cache" and self.divergence != "forward_kl" and self.tail != "bucket":
            raise ValueError(
                f"divergence={self.divergence} with a cached teacher needs tail=bucket"
            )
        if self.hidden and self.teacher != "online":
            raise ValueError(
                f"hidden={self.hidden:g} needs the teacher's layers: teacher=online, not "
                f"{self.teacher}"
            )
        return self

    @property
    def together(self) -> int:
        """Windows of a forward pass."""
        return self.microbatch or self.batch


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
class Run:
    out: str = Field(description="run folder")
    seed: int = Field(default=0, ge=0, description="decides every random draw")
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

    @pydantic.model_validator(mode="after")
    def _teacher_of_candidates(self) -> "Run":
        if self.search.candidates > 1 and self.distill.teacher != "online":
            raise ValueError(
                f"search.candidates={self.search.candidates} recovers them with the teacher in the "
                f"step: it needs distill.teacher=online, not {self.distill.teacher}"
            )
        return self
