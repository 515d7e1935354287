"""Every parameter of a model: names, shapes and axes. Without jax: reading needs no more.

Axes as in decoder.py, in the order of Hugging Face's files (a matrix is [out, in]): loading and
exporting are copies of bytes, which no transposition slows down.
"""

import math
from typing import Any, NamedTuple

from e3jax.models.config import Experts, Latent, ModelConfig

Params = dict[str, Any]
Axes = tuple[str | None, ...]

STD = 0.02  # of matrices that start at random


class Leaf(NamedTuple):
    """One parameter: its shape, the logical name of each axis, and the scale it starts with."""

    shape: tuple[int, ...]
    axes: Axes
    init: float | None  # standard deviation; 0 = zeros, None = ones


def param_table(cfg: ModelConfig) -> Params:
    """Every parameter of the model as a nested dict of Leaf: the one source of shapes and specs."""
    D, V = cfg.width, cfg.vocab_size
    table: Params = {"embed": Leaf((V, D), ("vocab", "embed"), STD)}
    for name, ids in cfg.stacks.items():
        leaves = layer_table(cfg, sparse=cfg.is_sparse(ids[0]))
        table[name] = {
            key: Leaf((len(ids), *leaf.shape), (None, *leaf.axes), leaf.init)
            for key, leaf in leaves.items()
        }
    table |= _norm(cfg, "final_norm")
    if not cfg.tied:
        table["head"] = Leaf((V, D), ("vocab", "embed"), STD)
    return table


def layer_table(cfg: ModelConfig, *, sparse: bool) -> dict[str, Leaf]:
    """The parameters of one layer, in the order of the network; sparse: it has experts."""
    out = STD / math.sqrt(2 * cfg.num_layers)  # GPT-2: residual branches add up over depth
    before, after = cfg.norms != "after", cfg.norms != "before"
    leaves = _norm(cfg, "attn_norm") if before else {}
    leaves |= _latent(cfg, cfg.latent, out) if cfg.latent else _attention(cfg, out)
    leaves |= _norm(cfg, "attn_out_norm") if after else {}
    leaves |= _norm(cfg, "mlp_norm") if before and not cfg.parallel else {}
    if sparse:
        assert cfg.experts is not None
        leaves |= _experts(cfg.width, cfg.experts, out)
    else:
        leaves |= _mlp(cfg, out)
    return leaves | (_norm(cfg, "mlp_out_norm") if after else {})


def _norm(cfg: ModelConfig, name: str) -> dict[str, Leaf]:
    """A norm of the residual stream or of what is added to it."""
    leaves = {name: _scale(cfg.width, cfg.norm_offset)}
    if cfg.norm_bias:
        leaves[f"{name}_bias"] = Leaf((cfg.width,), (None,), 0.0)
    return leaves


def _scale(size: int, offset: float = 0.0) -> Leaf:
    """The weight of a norm, which multiplies by 1 at first."""
    return Leaf((size,), (None,), 0.0 if offset else None)


def _attention(cfg: ModelConfig, out: float) -> dict[str, Leaf]:
    D, K, G, H = cfg.width, cfg.num_kv_heads, cfg.num_groups, cfg.head_dim
    leaves = {
        "q": Leaf((K, G, H, D), ("heads", "groups", None, "embed"), STD),
        "k": Leaf((K, H, D), ("heads", None, "embed"), STD),
        "v": Leaf((K, H, D), ("heads", None, "embed"), STD),
        "o": Leaf((D, K, G, H), ("embed", "heads", "groups", None), out),
    }
    if cfg.qkv_bias:
        leaves["q_bias"] = Leaf((K, G, H), ("heads", "groups", None), 0.0)
        leaves["k_bias"] = Leaf((K, H), ("heads", None), 0.0)
        leaves["v_bias"] = Leaf((K, H), ("heads", None), 0.0)
    if cfg.sinks:
        leaves["sink_bias"] = Leaf((K, G), ("heads", "groups"), 0.0)
    if cfg.out_bias:
        leaves["o_bias"] = Leaf((D,), (None,), 0.0)
    if cfg.qk_norm == "whole":
        leaves["q_norm"] = Leaf((K, G, H), ("heads", "groups", None), None)
        leaves["k_norm"] = Leaf((K, H), ("heads", None), None)
    elif cfg.qk_norm:
        leaves |= {name: _scale(H, cfg.norm_offset) for name in ("q_norm", "k_norm")}
    return leaves


def _latent(cfg: ModelConfig, latent: Latent, out: float) -> dict[str, Leaf]:
    D, N, C = cfg.width, cfg.num_heads, latent.kv_rank
    H, value = cfg.head_dim, latent.value_dim
    if latent.q_rank is None:
        leaves = {"q": Leaf((N, H, D), ("heads", None, "embed"), STD)}
    else:
        leaves = {
            "q_down": Leaf((latent.q_rank, D), (None, "embed"), STD),
            "q_down_norm": _scale(latent.q_rank),
            "q_up": Leaf((N, H, latent.q_rank), ("heads", None, "rank"), STD),
        }
    return leaves | {
        "kv_down": Leaf((C + latent.rope_dim, D), (None, "embed"), STD),
        "kv_down_norm": _scale(C),
        "kv_up": Leaf((N, latent.nope_dim + value, C), ("heads", None, "rank"), STD),
        "o": Leaf((D, N, value), ("embed", "heads", None), out),
    }


def _mlp(cfg: ModelConfig, out: float) -> dict[str, Leaf]:
    D, F = cfg.width, cfg.mlp_width
    wide = ("gate", "up") if cfg.gated else ("up",)
    leaves = {name: Leaf((F, D), ("mlp", "embed"), STD) for name in wide}
    leaves["down"] = Leaf((D, F), ("embed", "mlp"), out)
    if cfg.mlp_bias:
        leaves |= {f"{name}_bias": Leaf((F,), ("mlp",), 0.0) for name in wide}
        leaves["down_bias"] = Leaf((D,), (None,), 0.0)
    return leaves


def _experts(D: int, experts: Experts, out: float) -> dict[str, Leaf]:
    E, F, S = experts.count, experts.width, experts.shared_width
    leaves = {"router": Leaf((E, D), (None, "embed"), STD)}
    if experts.corrected:
        leaves["router_choice_bias"] = Leaf((E,), (None,), 0.0)
    if experts.joined:
        leaves |= {
            "router_bias": Leaf((E,), (None,), 0.0),
            "expert_in": Leaf((E, D, F, 2), ("experts", "embed", None, None), STD),
            "expert_in_bias": Leaf((E, F, 2), ("experts", None, None), 0.0),
            "expert_out": Leaf((E, F, D), ("experts", None, "embed"), out),
            "expert_out_bias": Leaf((E, D), ("experts", None), 0.0),
        }
    else:
        leaves |= {
            "expert_gate": Leaf((E, F, D), ("experts", None, "embed"), STD),
            "expert_up": Leaf((E, F, D), ("experts", None, "embed"), STD),
            "expert_down": Leaf((E, D, F), ("experts", "embed", None), out),
        }
    if S:
        leaves["shared_gate"] = Leaf((S, D), ("mlp", "embed"), STD)
        leaves["shared_up"] = Leaf((S, D), ("mlp", "embed"), STD)
        leaves["shared_down"] = Leaf((D, S), ("embed", "mlp"), out)
    if experts.shared_gate:
        leaves["shared_router"] = Leaf((1, D), (None, "embed"), STD)
    return leaves


def expert_axes(experts: Experts) -> dict[str, Axes]:
    """Of the parameters that each expert has its own of, the logical axes."""
    leaves = _experts(1, experts, 0.0)
    return {name: leaf.axes for name, leaf in leaves.items() if is_expert(name)}


def count_params(cfg: ModelConfig) -> int:
    """Parameters, a tied head counted once."""
    table = param_table(cfg)
    stacks = [leaf for name in cfg.stacks for leaf in table.pop(name).values()]
    return sum(math.prod(leaf.shape) for leaf in [*stacks, *table.values()])


def active_params(cfg: ModelConfig) -> int:
    """Those that a token meets: of the experts the ones that it is sent to."""
    idle = 0
    if cfg.experts is not None:
        E, k = cfg.experts.count, cfg.experts.per_token
        leaves = layer_table(cfg, sparse=True)
        each = sum(math.prod(leaf.shape) for name, leaf in leaves.items() if is_expert(name))
        idle = (cfg.num_layers - len(cfg.dense)) * each * (E - k) // E
    return count_params(cfg) - idle


def is_expert(name: str) -> bool:
    """Whether a parameter is one of an expert, of which a token is sent to some only."""
    return name.startswith("expert_")


def is_feed_forward(name: str) -> bool:
    """Whether a parameter of a layer is one of its mlp or its experts, norms apart."""
    return name.startswith(("gate", "up", "down", "router", "expert_", "shared_"))
