"""The configuration of a run: frozen, typed, strict. YAML in; an unknown key or bad value is an error.

Every field carries its own help text, so `--help`, validation and the code share one source.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from e3jax.errors import UserError

strict = pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))

Rows = Annotated[str, Field(pattern=r"^-?\d*:-?\d*$")]


@strict
class Model:
    path: str = Field("demo", description="folder, Hugging Face hub id, or `demo` (the bundled model)")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="compute dtype")
    remat: Literal["none", "layer"] = Field(
        "layer", description="what backward recomputes: nothing, or each layer from its input"
    )


@strict
class Mesh:
    replica: int = Field(1, ge=1, description="data-parallel replicas (between slices)")
    data: int = Field(-1, ge=-1, description="FSDP size; -1 = all remaining devices")
    model: int = Field(1, ge=1, description="tensor-parallel size")


@strict
class Source:
    path: str = Field(description="file (jsonl, json, parquet, text; .gz too), folder or hub id")
    name: str | None = Field(None, description="hub configuration name")
    split: str = Field("train", description="split")
    rows: tuple[Rows, ...] = Field((), description="Python slices of the rows used; empty = all")
    streaming: bool = Field(False, description="read lazily from the hub")
    format: Literal["auto", "text", "completion", "messages", "chat"] = Field(
        "auto",
        description="which fields are read; auto looks at the columns; chat = prompt and completion"
        " as a user's and an assistant's turn of the chat template",
    )
    text: str = Field("text", description="field of plain text")
    prompt: str = Field("prompt", description="field of the prompt")
    completion: str = Field("completion", description="field of the completion")
    messages: str = Field("messages", description="field of a list of {role, content}")
    answer: str = Field("answer", description="field of the checkable answer (test data)")
    separator: str = Field(" ", description="stands between prompt and completion")


@strict
class Data:
    train: tuple[Source, ...] = Field((), description="calibration and recovery data")
    held_out: tuple[Source, ...] = Field((), description="scores the search and the student; never trained on")
    test: tuple[Source, ...] = Field((), description="problems with a checkable answer")
    measure: tuple[Source, ...] = Field((), description="text for perplexity and KL; none = test")
    window: int = Field(4096, ge=8, description="tokens a row of a batch")
    pack: bool = Field(True, description="several documents a window, isolated by segment ids")
    loss_on: Literal["all", "completion"] = Field("all", description="tokens that carry loss")
    long_rows: Literal["split", "drop"] = Field("split", description="what becomes of documents longer than the window")
    decontaminate: tuple[str, ...] = Field(
        ("math-500", "gsm8k"),
        description="evaluation sets (known names or jsonl files) whose questions may not occur in train",
    )
    cache: str = Field("~/.cache/e3jax/tokens", description="folder of tokenised windows")


@strict
class Optimizer:
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps with rising learning rate")
    final: float = Field(0.1, ge=0, le=1, description="last learning rate as a share of the peak (cosine)")
    b1: float = Field(0.9, ge=0, lt=1, description="Adam")
    b2: float = Field(0.95, ge=0, lt=1, description="Adam")
    eps: float = Field(1e-8, gt=0, description="Adam")
    weight_decay: float = Field(0.0, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="global gradient norm")


@strict
class Search:
    keep: int | float = Field(0.75, gt=0, description="layers kept: a count, or a share below 1")
    steps: int = Field(500, ge=1, description="search steps")
    batch: int = Field(16, ge=1, description="windows a step; each draws its own mask")
    init: Literal["kl", "zeros", "random"] = Field("kl", description="start of theta")
    init_form: Literal["log", "rank"] = Field("log", description="importance -> theta: zscore(log s) or zscore(rank)")
    init_scale: float = Field(2.0, ge=0, description="spread of the start in Gumbel standard deviations (1.28)")
    init_windows: int = Field(16, ge=1, description="windows that measure the importance")
    estimator: Literal["score", "straight_through", "mixed"] = Field("score", description="gradient of theta")
    relaxation: Literal["threshold", "khot", "softmax"] = Field("threshold", description="backward of straight_through")
    masks: Literal["row", "batch"] = Field("row", description="one mask a row, or one a batch")
    tau: tuple[float, float] = Field((4.0, 0.3), description="relaxation temperature, first and last")
    curriculum: float = Field(0.3, ge=0, le=1, description="share of the steps over which K falls from L")
    loss: Literal["kl", "ce"] = Field("kl", description="KL to the dense model, or next-token cross-entropy")
    lr: float = Field(0.1, gt=0, description="learning rate of theta (Adam)")
    protect: tuple[int, ...] = Field((), description="layers never removed")
    force: tuple[int, ...] = Field((), description="layers always removed")
    score_every: int = Field(20, ge=1, description="steps between held-out scores of the current answer")
    score_windows: int = Field(16, ge=1, description="held-out windows a score")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints")


@strict
class Distill:
    mask: str | None = Field(None, description="mask file to recover; none = this run's search")
    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch: int = Field(64, ge=1, description="windows a step")
    microbatch: int | None = Field(None, ge=1, description="windows a forward pass; divides batch")
    optimizer: Optimizer = Field(Optimizer(), description="")
    weight: Literal["teacher", "student", "joint", "uniform"] = Field("teacher", description="entropy that weighs a token")
    weight_clip: tuple[float, float] = Field((0.2, 5.0), description="least and greatest token weight")
    weight_power: float = Field(1.0, ge=0, description="sharpness: w = (H / mean H) ** power")
    divergence: Literal["forward_kl", "reverse_kl", "skew_kl"] = Field("forward_kl", description="teacher || student and its kin")
    skew: float = Field(0.1, gt=0, lt=1, description="lambda of skew_kl")
    temperature: float = Field(1.0, gt=0, description="distillation temperature T; the loss carries T**2")
    ce: float = Field(0.0, ge=0, le=1, description="share of the loss that is next-token cross-entropy")
    teacher: Literal["online", "cache", "none"] = Field("online", description="full-vocabulary teacher in the step, its stored top-k, or none (plain fine-tuning)")
    top_k: int = Field(10, ge=1, description="stored logits a token")
    tail: Literal["renormalise", "drop", "bucket"] = Field("bucket", description="what stands for the outcomes beyond top_k")
    chunk: int = Field(2048, ge=1, description="tokens whose logits exist at a time")
    evaluate_every: int = Field(100, ge=1, description="steps between held-out figures")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")
    patience: int = Field(10, ge=1, description="non-finite steps in a row that stop the job")


@strict
class Train:
    config: str | None = Field(None, description="config.json to start from scratch with; none = continue model.path")
    tokenizer: str | None = Field(None, description="tokenizer folder, with config")
    recipe: Distill = Field(Distill(teacher="none", weight="uniform", ce=1.0), description="")


@strict
class Export:
    dtype: Literal["source", "bfloat16", "float16", "float32"] = Field("source", description="dtype written; source = the checkpoint's own")
    shard_gb: float = Field(5.0, gt=0, le=5, description="greatest shard, 10**9 bytes")
    raw: bool = Field(False, description="export the un-recovered model too")


@strict
class Evaluate:
    rows: int | None = Field(None, ge=1, description="test problems; none = all")
    batch: int = Field(64, ge=1, description="problems decoded together")
    max_new_tokens: int = Field(256, ge=1, description="longest answer")
    answer: str = Field(r"answer : (\S+)", description="regular expression whose first group is the answer; its last match counts")
    baselines: tuple[Literal["shortgpt"], ...] = Field(("shortgpt",), description="selectors given the same recovery")
    loss_curve: bool = Field(True, description="loss after each successive removal")


@strict
class Run:
    out: str = Field(description="run folder")
    seed: int = Field(0, ge=0, description="decides every random draw")
    deterministic: bool = Field(False, description="bitwise repeatable on GPU, slower")
    model: Model = Field(Model(), description="the model")
    mesh: Mesh = Field(Mesh(), description="devices")
    data: Data = Field(Data(), description="data")
    search: Search = Field(Search(), description="stage 1")
    distill: Distill = Field(Distill(), description="stage 2")
    train: Train = Field(Train(), description="plain training (the `train` command)")
    export: Export = Field(Export(), description="safetensors out")
    evaluate: Evaluate = Field(Evaluate(), description="figures")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Run":
        if self.distill.teacher == "cache" and self.distill.weight in ("student", "joint"):
            if self.distill.tail != "bucket":
                raise ValueError("distill.weight student/joint with a cached teacher needs tail=bucket")
        return self


def load_run(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Run:
    """Reads a YAML file, applies `key.path=value` overrides (values are YAML), validates.

    Raises UserError naming the file, key and value; an unknown key comes with the nearest known one.
    """
    path = pathlib.Path(path)
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    for text in overrides:
        _override(tree, text)
    return validate(tree, str(path))


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: expected key=value, such as search.keep=24")
    *parents, last = key.split(".")
    place: Any = tree
    for name in parents:
        if isinstance(place, dict):
            place.setdefault(name, {})
        place = _child(place, name, text)
    if isinstance(place, list):
        _child(place, last, text)
    elif not isinstance(place, dict):
        raise UserError(f"override {text!r}: {'.'.join(parents)} is a value, not a section")
    try:
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not valid YAML") from error


def _child(place: Any, name: str, text: str) -> Any:
    """One step down a dotted key; lists are entered by number, as in data.train.0.path."""
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    raise UserError(f"override {text!r}: there is nothing at {name}")


def validate(tree: dict[str, Any], where: str) -> Run:
    """A nested dict -> Run. Raises UserError listing every wrong key and value."""
    try:
        return pydantic.TypeAdapter(Run).validate_python(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise UserError("\n".join([f"{where}: {len(lines)} mistake(s) in the configuration", *lines]))


def _explain(error: Any) -> str:
    place = [p for p in error["loc"] if p not in ("int", "float", "str", "none")]
    key = ".".join(str(p) for p in place)
    if error["type"] == "unexpected_keyword_argument":
        known = known_keys()
        general = ".".join(str(p) for p in place if not isinstance(p, int))
        near = difflib.get_close_matches(general, known, 1, 0.5)
        return f"  {key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"  {key}: required and missing"
    return f"  {key}: {error['msg'].removeprefix('Value error, ')} (found {error['input']!r})"


def known_keys(cls: Any = Run, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the configuration with its help text."""
    keys = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        section = _section(field.type)
        if section is not None:
            keys |= known_keys(section, name + ".")
        else:
            keys[name] = field.default.description or ""
    return keys


def _section(annotation: Any) -> Any:
    """The dataclass inside X or tuple[X, ...], or None."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)


def as_dict(run: Run) -> dict[str, Any]:
    """Plain JSON-able form of a configuration."""
    return pydantic.TypeAdapter(Run).dump_python(run, mode="json")
