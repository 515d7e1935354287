"""The same work by us and by transformers: the logits after prompts, and greedy answers to them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from e3jax import ledger, mesh
from e3jax.bench.timing import seconds
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate


@dataclasses.dataclass(frozen=True)
class Steps:
    """A model and B prompts of T tokens on a device. Calls return when the device is done."""

    prefill: Callable[[], Any]  # the logits after each prompt, [B, V]
    answer: Callable[[int], Any]  # so many tokens for each, the most likely ones: int [B, count]
    memory: Callable[[], int]  # bytes at most so far: of the device, else resident on the host


def random_prompts(vocab_size: int, batch: int, time: int, seed: int) -> np.ndarray:
    """Token ids, int32 [B, T]."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, time), dtype=np.int32)


def ours(params: Params, cfg: ModelConfig, prompts: np.ndarray, dtype: Any) -> Steps:
    """Ours, on the mesh that is set. No token ends an answer."""
    rows, ones = prompts.tolist(), np.ones_like(prompts)
    positions = np.broadcast_to(np.arange(prompts.shape[1], dtype=np.int32), prompts.shape)
    fields = (prompts, positions, ones, prompts, ones.astype(bool))
    batch = mesh.shard_batch(decoder.Batch(*fields, documents=1))
    generator = make_generator(cfg, dtype=dtype, eos=())
    weights = generator.prepare(params)

    @jax.jit
    def last_logits(params: Params, batch: decoder.Batch) -> jax.Array:
        h = decoder.hidden(params, batch, cfg, dtype=dtype, remat="none")
        return decoder.logits(params, h[:, -1:], cfg)[:, 0]

    def memory() -> int:
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or ledger.host_bytes()

    return Steps(
        prefill=lambda: jax.block_until_ready(last_logits(params, batch)),
        answer=lambda count: np.array(list(generate(generator, weights, rows, len(rows), count))),
        memory=memory,
    )


def theirs(model: Any, prompts: np.ndarray) -> Steps:
    """Those of transformers' `model`, which is on its device. No token ends an answer.

    On a GPU with torch.compile and a static cache, elsewhere as it comes.
    """
    import torch
    import transformers

    on_gpu = model.device.type == "cuda"
    tokens = torch.from_numpy(prompts).long().to(model.device)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    forward, options = model.forward, {}
    if on_gpu:
        # The second model's depth in a process is not a dynamic size of the first one's program.
        torch._dynamo.config.automatic_dynamic_shapes = False
        forward, options = torch.compile(forward), {"cache_implementation": "static"}

    def done(found: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        return found

    def prefill() -> Any:
        with torch.no_grad():
            return done(forward(tokens, use_cache=False, logits_to_keep=1).logits[:, -1])

    def answer(count: int) -> Any:
        mask = torch.ones_like(tokens)
        found = model.generate(
            tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, **options
        )
        assert found.shape == (len(prompts), prompts.shape[1] + count)
        return done(found[:, prompts.shape[1] :])

    memory = torch.cuda.max_memory_allocated if on_gpu else ledger.host_bytes
    return Steps(prefill, answer, memory)


def measure(steps: Steps, count: int, warm: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition, by phase: a prefill, the tokens of an answer of `count` behind
    its first, and whole answers, prompts included. The phases take turns."""
    turns = [
        tuple(map(seconds, (steps.prefill, lambda: steps.answer(1), lambda: steps.answer(count))))
        for _ in range(warm + repeats)
    ][warm:]
    return {
        "prefill": [prefill for prefill, _, _ in turns],
        "decode": [whole - first for _, first, whole in turns],
        "end to end": [whole for _, _, whole in turns],
    }


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far two models' logits [B, V] are from each other: the root mean square of the
    difference, in standard deviations of ours over the vocabulary."""
    difference = (theirs - theirs.mean(-1, keepdims=True)) - (ours - ours.mean(-1, keepdims=True))
    return float(np.sqrt(np.mean(difference**2) / np.mean(np.var(ours, axis=-1))))
