"""The model, the devices it is on, and the data."""

from typing import Annotated, Literal

from pydantic import Field

from e3jax.config.strict import strict

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
    instruction: str = Field(
        default="", description="ends the prompt, such as how the answer is to be written"
    )
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
