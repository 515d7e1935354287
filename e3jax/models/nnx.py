"""A model as a Flax NNX module, for tools that speak it: the same arrays, the same forward pass."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params


class Decoder(nnx.Module):
    """Parameters of any family, dense or pruned, as nnx.Param of their names: `embed`,
    `layers["q"]`, …; layers that are alike are one array, stacked on axis 0.

    No array is copied, nor by jax.jit, nnx.grad and nnx.jit(…, graph_updates=False); nnx.jit alone
    gives the module copies at each call. What an optimiser makes of them does not change `params`;
    `params()` has it as the nested dict that all other functions take.
    """

    def __init__(
        self, params: Params, cfg: ModelConfig, *, dtype: Any = jnp.bfloat16, remat: str = "layer"
    ) -> None:
        """dtype: of the computation. remat: what backward recomputes, as in `decoder.hidden`."""
        self.cfg, self.dtype, self.remat = cfg, jnp.dtype(dtype), remat
        for name, leaf in params.items():
            stack = isinstance(leaf, dict)
            own = nnx.Dict({k: nnx.Param(w) for k, w in leaf.items()}) if stack else nnx.Param(leaf)
            setattr(self, name, own)

    def params(self) -> Params:
        """The parameters as they are now, a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        gates: jax.Array | None = None,
    ) -> jax.Array:
        """Logits float32 [B, T, V] of token ids int32 [B, T].

        segments: int32 [B, T], the document of each token from 1, 0 = padding; None = one document.
        positions: int32 [B, T], within the document; None = from 0 on in each row. gates: float32
        [B, L] or [L] of 0 and 1; a layer of gate 0 is skipped exactly, and has a gradient.
        """
        ids = jnp.asarray(tokens, jnp.int32)
        ones, places = jnp.ones_like(ids), jnp.arange(ids.shape[1], dtype=jnp.int32)
        if gates is not None:
            gates = jnp.broadcast_to(gates, (len(ids), self.cfg.num_layers))
        batch = Batch(
            tokens=ids,
            positions=jnp.broadcast_to(places, ids.shape) if positions is None else positions,
            segments=ones if segments is None else segments,
            targets=ids,
            mask=ones > 0,
        )
        params = self.params()
        h = decoder.hidden(
            params, batch, self.cfg, dtype=self.dtype, gates_bl=gates, remat=self.remat
        )
        return decoder.logits(params, h, self.cfg)
