"""The tensors of a Hugging Face checkpoint <-> the leaves of the parameters: one two-way table."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from e3jax.models.config import ModelConfig
from e3jax.models.params import param_table

# Leaf -> tensor, its axes as stored (the letters of one stored axis together), and ours. Letters
# as in decoder.py: v vocabulary, d width, k key-value heads, g groups, h head width, f mlp width.
MODEL_TENSORS = {
    "embed": ("model.embed_tokens.weight", "v d", "vd"),
    "final_norm": ("model.norm.weight", "d", "d"),
    "head": ("lm_head.weight", "v d", "dv"),
}
LAYER_TENSORS = {
    "attn_norm": ("input_layernorm.weight", "d", "d"),
    "q": ("self_attn.q_proj.weight", "kgh d", "dkgh"),
    "k": ("self_attn.k_proj.weight", "kh d", "dkh"),
    "v": ("self_attn.v_proj.weight", "kh d", "dkh"),
    "o": ("self_attn.o_proj.weight", "d kgh", "kghd"),
    "q_bias": ("self_attn.q_proj.bias", "kgh", "kgh"),
    "k_bias": ("self_attn.k_proj.bias", "kh", "kh"),
    "v_bias": ("self_attn.v_proj.bias", "kh", "kh"),
    "o_bias": ("self_attn.o_proj.bias", "d", "d"),
    "q_norm": ("self_attn.q_norm.weight", "h", "h"),
    "k_norm": ("self_attn.k_norm.weight", "h", "h"),
    "mlp_norm": ("post_attention_layernorm.weight", "d", "d"),
    "gate": ("mlp.gate_proj.weight", "f d", "df"),
    "up": ("mlp.up_proj.weight", "f d", "df"),
    "down": ("mlp.down_proj.weight", "d f", "fd"),
    "gate_bias": ("mlp.gate_proj.bias", "f", "f"),
    "up_bias": ("mlp.up_proj.bias", "f", "f"),
    "down_bias": ("mlp.down_proj.bias", "d", "d"),
}
EMBED, HEAD = MODEL_TENSORS["embed"][0], MODEL_TENSORS["head"][0]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, and the piece of the parameters that it is."""

    name: str
    leaf: tuple[str, ...]  # keys of the nested dict of parameters
    layer: int | None  # index on the leaf's axis 0; None where the leaf is not stacked
    shape: tuple[int, ...]  # as stored
    split: tuple[int, ...]  # as stored, joined axes taken apart
    order: tuple[int, ...]  # our axes, as numbers of the split ones

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def source_name(self, keep: Sequence[int]) -> str:
        """Its name in the model whose layers `keep` became this one's."""
        if self.layer is None:
            return self.name
        return self.name.replace(f".{self.layer}.", f".{keep[self.layer]}.", 1)

    def as_stored(self, ours: np.ndarray) -> np.ndarray:
        """Piece of the leaf (or of its place in a stack) with the axes as stored: a view."""
        return ours.transpose(np.argsort(self.order))


def tensor_table(cfg: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of the model, in the order of the network: exactly the leaves of its params."""
    sizes = {
        "v": cfg.vocab_size,
        "d": cfg.width,
        "k": cfg.num_kv_heads,
        "g": cfg.num_groups,
        "h": cfg.head_dim,
        "f": cfg.mlp_width,
    }

    def tensor(leaf: tuple[str, ...], layer: int | None, name: str, hf: str, ours: str) -> Tensor:
        letters = hf.replace(" ", "")
        return Tensor(
            name=name,
            leaf=leaf,
            layer=layer,
            shape=tuple(math.prod(sizes[a] for a in axis) for axis in hf.split()),
            split=tuple(sizes[a] for a in letters),
            order=tuple(letters.index(a) for a in ours),
        )

    def rows() -> Iterator[Tensor]:
        leaves = param_table(cfg)
        yield tensor(("embed",), None, *MODEL_TENSORS["embed"])
        for i in range(cfg.num_layers):
            for leaf, (name, *axes) in LAYER_TENSORS.items():
                if leaf in leaves["layers"]:
                    yield tensor(("layers", leaf), i, f"model.layers.{i}.{name}", *axes)
        yield tensor(("final_norm",), None, *MODEL_TENSORS["final_norm"])
        if "head" in leaves:
            yield tensor(("head",), None, *MODEL_TENSORS["head"])

    return tuple(rows())
