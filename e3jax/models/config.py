"""The facts of an architecture, and nothing else: no behaviour, no Hugging Face names."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding and its context-extension scaling.

    `kind` names the formula; the fields below `theta` that a kind does not use keep their default.
    Sources: linear (kaiokendev 2023), dynamic (NTK-aware, reddit 2023), yarn (arXiv 2309.00071),
    llama3 (Llama 3.1 reference code), longrope (arXiv 2402.13753).
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0  # context before scaling; 0 where the kind does not need it
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn, longrope: multiplies cos and sin
    truncate: bool = True  # yarn: whether the correction range is rounded outwards to integers
    interleaved: bool = False  # neighbours turn together, not numbers half a head apart
    # longrope: what slows each plane, in rows within the original context and in longer ones
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the keys and values of all heads
    are made from one vector of `kv_rank` numbers a token and one rotated key that they share."""

    kv_rank: int  # C
    nope_dim: int  # of a head's queries and keys, what no position turns
    rope_dim: int  # and what is turned
    value_dim: int
    q_rank: int | None = None  # queries are made from a vector of so many numbers; None = from D
    norm_eps: float = 1e-6  # of those vectors


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts as feed-forward network: which a token is sent to, and their sum."""

    count: int  # E
    per_token: int
    width: int  # F of an expert
    # Of the router's outcomes: over all experts, each alone, or over those chosen.
    scores: Literal["softmax", "sigmoid", "softmax of chosen"] = "softmax"
    normalised: bool = True  # the weights of those chosen are made to add up to 1
    scale: float = 1.0  # and then multiplied by this
    corrected: bool = False  # a bias that helps to choose and does not weigh (arXiv 2408.15664)
    groups: int = 1  # of experts that follow each other; a token is sent to few of them
    groups_taken: int = 1
    group_score: Literal["greatest", "two"] = "greatest"  # one expert's, or the best two's sum
    shared_width: int = 0  # of a network that every token is sent to; 0 = none
    shared_gate: bool = False  # which a sigmoid weighs
    # gpt-oss: matrices are [in, out], gate and up one of them, number by number in turns; biases;
    # and (up + 1) gate sigmoid(1.702 gate) of what is clipped to so much.
    joined: bool = False
    limit: float | None = None


class Run(NamedTuple):
    """Layers that follow each other and are alike: their parameters lie together in a stack."""

    stack: str  # key of the parameters
    first: int  # the first layer's number
    at: int  # its place in the stack
    count: int


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
    # RMS norm on queries and keys, before rope: over each head, or over all heads as one.
    qk_norm: bool | Literal["whole"] = False
    qkv_clip: float | None = None  # what queries, keys and values are clipped to
    latent: Latent | None = None  # instead of attention by q, k and v
    experts: Experts | None = None
    dense: tuple[int, ...] = ()  # the layers that have the mlp although the model has experts
    attention_scale: float | None = None  # of the scores; None = head_dim ** -0.5
    sinks: bool = False  # each head has a score to nothing, beside those to its keys
    attention_cap: float | None = None  # soft cap of the scores: cap tanh(score / cap)
    logits_scale: float = 1.0  # the head's products are multiplied by this
    logits_cap: float | None = None  # and then held below this, softly
    embed_scale: float = 1.0  # of the token embeddings, rounded to the dtype they are in
    residual_scale: float = 1.0  # of what attention and mlp add to the residual stream
    norm: Literal["rms", "layer"] = "rms"  # kind of all norms but those of queries and keys
    norm_bias: bool = False  # of the kind "layer"
    norm_offset: float = 0.0  # norms multiply by this plus their weight, and not the weight alone
    # Where a layer's norms are: before attention and mlp, after them, or both.
    norms: Literal["before", "after", "around"] = "before"
    parallel: bool = False  # attention and mlp read the same norm, and both are added at once
    gated: bool = True  # the mlp multiplies its activations by a second product
    # Of a head's queries and keys, the first so many numbers are turned by their position; None =
    # all of them.
    turned: int | None = None
    # Per layer, where layers differ: its rope, None = positions turn nothing. () = all have `rope`.
    ropes: tuple[Rope | None, ...] = ()

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert len(self.windows) == self.num_layers, (len(self.windows), self.num_layers)
        assert len(self.ropes) in (0, self.num_layers), (len(self.ropes), self.num_layers)
        assert self.experts is not None or not self.dense, self.dense

    @property
    def num_groups(self) -> int:
        """G: query heads a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Key of the parameters -> the layers stacked there, those whose parameters are alike."""
        everything = range(self.num_layers)
        sparse = tuple(i for i in everything if i not in self.dense)
        stacks = {"dense_layers": self.dense, "layers": sparse}
        return {name: ids for name, ids in stacks.items() if ids}

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer not in self.dense

    @property
    def cached_width(self) -> int:
        """Numbers a token that decoding keeps of a layer: keys and values, or what makes both."""
        if self.latent is not None:
            return self.latent.kv_rank + self.latent.rope_dim
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many numbers of a head's queries and keys are turned by their position."""
        return self.latent.rope_dim if self.latent else self.turned or self.head_dim

    @property
    def runs(self) -> tuple[Run, ...]:
        """All layers in the order of the network."""
        place = {i: (name, at) for name, ids in self.stacks.items() for at, i in enumerate(ids)}
        runs: list[Run] = []
        for i in range(self.num_layers):
            name, at = place[i]
            if runs and runs[-1].stack == name:
                runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
            else:
                runs.append(Run(name, i, at, 1))
        return tuple(runs)

    def take_layers(self, keep: Sequence[int]) -> "ModelConfig":
        """The configuration of the model made of layers `keep`, in that order."""
        return dataclasses.replace(
            self,
            num_layers=len(keep),
            windows=tuple(self.windows[i] for i in keep),
            dense=tuple(new for new, old in enumerate(keep) if old in self.dense),
            ropes=tuple(self.ropes[i] for i in keep) if self.ropes else (),
        )
