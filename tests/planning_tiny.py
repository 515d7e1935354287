"""A small model and run to plan for."""

from e3jax import configure
from e3jax.models.config import ModelConfig

MODEL = ModelConfig(
    family="qwen3",
    num_layers=3,
    width=256,
    mlp_width=768,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=1024,
    max_position=4096,
    norm_eps=1e-6,
    tied=False,
    windows=(None,) * 3,
    qk_norm=True,
)


def small_run(out="x", **distill):
    fields = {"batch": 16, "chunk": 512, "teacher": "online", **distill}
    tree = {"out": str(out), "data": {"window": 64}, "search": {"keep": 2}, "distill": fields}
    return configure.validate(tree, "small")
