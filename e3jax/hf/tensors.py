"""The tensors of a Hugging Face checkpoint <-> the leaves of the parameters: one two-way table."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from e3jax.hf.families import FAMILIES
from e3jax.models.config import ModelConfig
from e3jax.models.params import Leaf, param_table

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FINAL_NORM = {"final_norm": "model.norm.weight", "final_norm_bias": "model.norm.bias"}
OWN = ("experts", "embed", "rank")  # axes that a stored tensor has too; others' neighbours are one


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of the parameters that lies together in a checkpoint, in the same order."""

    leaf: tuple[str, ...]  # keys of the nested dict of parameters
    index: tuple[int, ...]  # on the leaf's first axes: its layer's place in the stack, its expert
    split: tuple[int, ...]  # the shape of what is left of the leaf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: pieces of the parameters, one after another."""

    name: str
    layer: int | None  # the number in its name; None where it is of no layer
    shape: tuple[int, ...]  # as stored
    pieces: tuple[Piece, ...]

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

    def rows() -> Iterator[Tensor]:
        yield _tensor(EMBED, None, {("embed",): leaves["embed"]}, ())
        for run in cfg.runs:
            for at in range(run.count):
                yield from _of_layer(cfg, run.stack, run.first + at, run.at + at, leaves[run.stack])
        for key, name in FINAL_NORM.items():
            if key in leaves:
                yield _tensor(name, None, {(key,): leaves[key]}, ())
        if "head" in leaves:
            yield _tensor(HEAD, None, {("head",): leaves["head"]}, ())

    return tuple(rows())


def _of_layer(
    cfg: ModelConfig, stack: str, number: int, place: int, leaves: dict[str, Leaf]
) -> Iterator[Tensor]:
    names, joined = FAMILIES[cfg.family].tensors, {}
    for key, leaf in leaves.items():
        joined.setdefault(names[key], {})[stack, key] = leaf
    for of_experts, group in itertools.groupby(joined.items(), lambda item: "{}" in item[0]):
        group = list(group)
        experts = range(cfg.experts.count) if of_experts and cfg.experts else (None,)
        for expert in experts:
            index = (place,) if expert is None else (place, expert)
            for name, parts in group:
                name = f"model.layers.{number}.{name.format(expert)}"
                yield _tensor(name, number, parts, index)


def _tensor(
    name: str,
    layer: int | None,
    parts: dict[tuple[str, ...], Leaf],
    index: tuple[int, ...],
) -> Tensor:
    pieces, shapes = [], []
    for keys, leaf in parts.items():
        split, axes = leaf.shape[len(index) :], leaf.axes[len(index) :]
        pieces.append(Piece(keys, index, split))
        sides = itertools.groupby(zip(split, axes, strict=True), lambda x: x[1] in OWN and x[1])
        shapes.append(tuple(math.prod(size for size, _ in side) for _, side in sides))
    rows = sum(shape[0] for shape in shapes)
    return Tensor(name, layer, (rows, *shapes[0][1:]), tuple(pieces))
