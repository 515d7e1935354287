"""The tensors of a Hugging Face checkpoint <-> the leaves of the parameters: one two-way table."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

from e3jax.models.config import ModelConfig
from e3jax.models.params import param_table

# Leaf -> tensor. Where several of our axes are one of its own, they are its neighbours, joined.
MODEL_TENSORS = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
EMBED, HEAD = MODEL_TENSORS["embed"], MODEL_TENSORS["head"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, and the piece of the parameters that it is."""

    name: str
    leaf: tuple[str, ...]  # keys of the nested dict of parameters
    layer: int | None  # index on the leaf's axis 0; None where the leaf is not stacked
    shape: tuple[int, ...]  # as stored
    split: tuple[int, ...]  # of the leaf (of one layer): the same elements in the same order

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def source_name(self, keep: Sequence[int]) -> str:
        """Its name in the model whose layers `keep` became this one's."""
        if self.layer is None:
            return self.name
        return self.name.replace(f".{self.layer}.", f".{keep[self.layer]}.", 1)


def tensor_table(cfg: ModelConfig) -> tuple[Tensor, ...]:
    """Every tensor of the model, in the order of the network: exactly the leaves of its params."""
    leaves = param_table(cfg)

    def tensor(name: str, *keys: str, layer: int | None = None) -> Tensor:
        leaf = functools.reduce(lambda tree, key: tree[key], keys, leaves)
        split, axes = (leaf.shape, leaf.axes) if layer is None else (leaf.shape[1:], leaf.axes[1:])
        # A stored matrix has the model's width on one axis, and on the other all else.
        sides = itertools.groupby(zip(split, axes), lambda item: item[1] == "embed")
        shape = tuple(math.prod(size for size, _ in side) for _, side in sides)
        return Tensor(name, keys, layer, shape, split)

    def rows() -> Iterator[Tensor]:
        yield tensor(MODEL_TENSORS["embed"], "embed")
        for i in range(cfg.num_layers):
            for leaf, name in LAYER_TENSORS.items():
                if leaf in leaves["layers"]:
                    yield tensor(f"model.layers.{i}.{name}", "layers", leaf, layer=i)
        yield tensor(MODEL_TENSORS["final_norm"], "final_norm")
        if "head" in leaves:
            yield tensor(MODEL_TENSORS["head"], "head")

    return tuple(rows())
