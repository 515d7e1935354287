"""Every parameter of a model: names, shapes and axes. Without jax: reading needs no more.

Axes as in decoder.py, in the order of Hugging Face's files (a matrix is [out, in]): loading and
exporting are copies of bytes, which no transposition slows down.
"""

import math
from typing import Any, NamedTuple

from e3jax.models.config import ModelConfig

Params = dict[str, Any]


class Leaf(NamedTuple):
    """One parameter: its shape, the logical name of each axis, and the scale it starts with."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: float | None  # standard deviation; 0 = zeros, None = ones


def param_table(cfg: ModelConfig) -> Params:
    """Every parameter of the model as a nested dict of Leaf: the one source of shapes and specs."""
    L, D, F, V = cfg.num_layers, cfg.width, cfg.mlp_width, cfg.vocab_size
    K, G, H = cfg.num_kv_heads, cfg.num_groups, cfg.head_dim
    std = 0.02
    std_out = std / math.sqrt(2 * L)  # GPT-2: residual branches add up over depth

    def layer(shape: tuple[int, ...], axes: tuple[str | None, ...], init: float | None) -> Leaf:
        return Leaf((L, *shape), (None, *axes), init)

    layers = {
        "attn_norm": layer((D,), (None,), None),
        "q": layer((K, G, H, D), ("heads", "groups", None, "embed"), std),
        "k": layer((K, H, D), ("heads", None, "embed"), std),
        "v": layer((K, H, D), ("heads", None, "embed"), std),
        "o": layer((D, K, G, H), ("embed", "heads", "groups", None), std_out),
        "mlp_norm": layer((D,), (None,), None),
        "gate": layer((F, D), ("mlp", "embed"), std),
        "up": layer((F, D), ("mlp", "embed"), std),
        "down": layer((D, F), ("embed", "mlp"), std_out),
    }
    if cfg.qkv_bias:
        layers["q_bias"] = layer((K, G, H), ("heads", "groups", None), 0.0)
        layers["k_bias"] = layer((K, H), ("heads", None), 0.0)
        layers["v_bias"] = layer((K, H), ("heads", None), 0.0)
    if cfg.out_bias:
        layers["o_bias"] = layer((D,), (None,), 0.0)
    if cfg.qk_norm:
        layers["q_norm"] = layer((H,), (None,), None)
        layers["k_norm"] = layer((H,), (None,), None)
    if cfg.mlp_bias:
        layers["gate_bias"] = layer((F,), ("mlp",), 0.0)
        layers["up_bias"] = layer((F,), ("mlp",), 0.0)
        layers["down_bias"] = layer((D,), (None,), 0.0)
    table: Params = {
        "embed": Leaf((V, D), ("vocab", "embed"), std),
        "layers": layers,
        "final_norm": Leaf((D,), (None,), None),
    }
    if not cfg.tied:
        table["head"] = Leaf((V, D), ("vocab", "embed"), std)
    return table


def count_params(cfg: ModelConfig) -> int:
    """Parameters, a tied head counted once."""
    table = param_table(cfg)
    leaves = [*table.pop("layers").values(), *table.values()]
    return sum(math.prod(leaf.shape) for leaf in leaves)
