"""The facts of an architecture, and nothing else: no behaviour, no Hugging Face names."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding and its context-extension scaling.

    `kind` names the formula; the fields below `theta` that a kind does not use keep their default.
    Sources: linear (kaiokendev 2023), dynamic (NTK-aware, reddit 2023), yarn (arXiv 2309.00071),
    llama3 (Llama 3.1 reference code).
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0  # context before scaling; 0 where the kind does not need it
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: whether the correction range is rounded outwards to integers


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes in elements; see decoder.py for the axis letters."""

    family: str
    num_layers: int  # L
    width: int  # D
    mlp_width: int  # F
    num_heads: int  # N = K * G
    num_kv_heads: int  # K
    head_dim: int  # H
    vocab_size: int  # V, as stored: it may exceed the tokenizer's
    max_position: int
    norm_eps: float
    tied: bool  # the output head is the embedding
    windows: tuple[int | None, ...]  # per layer: sliding-window length in tokens, None = full
    rope: Rope = Rope()
    activation: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over head_dim on queries and keys, before rope

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert len(self.windows) == self.num_layers, (len(self.windows), self.num_layers)

    @property
    def num_groups(self) -> int:
        """G: query heads a key-value head."""
        return self.num_heads // self.num_kv_heads

    def take_layers(self, keep: Sequence[int]) -> "ModelConfig":
        """The configuration of the model made of layers `keep`, in that order."""
        windows = tuple(self.windows[i] for i in keep)
        return dataclasses.replace(self, num_layers=len(keep), windows=windows)
