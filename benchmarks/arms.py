"""What benchmarks on a GPU have in common: shapes, an arm in a process of its own, its timing."""

import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from e3jax.bench import timing  # noqa: E402

ROW = 4096
VOCAB = 151_936
WARM, STEPS = 4, 6
SHAPES = {  # layers, width, mlp, heads, key-value heads, tied; heads are 128 wide
    "0.6b": (28, 1024, 3072, 16, 8, True),
    "1.7b": (28, 2048, 6144, 16, 8, True),
    "4b": (36, 2560, 9728, 32, 8, True),
    "8b": (36, 4096, 12288, 32, 8, False),
    "30b-a3b": (48, 2048, 6144, 32, 4, False),  # Qwen3-30B-A3B: ours alone
    "3b": (48, 2048, 6144, 32, 4, False),  # dense, as many parameters as a token meets there
}
EXPERTS = {"30b-a3b": (128, 8, 768)}  # count, taken by a token, width
LR = 1e-5


def depth(shapes: str, layers: int | None) -> int:
    """Layers of the dense model: as many as asked for, or as the published one has."""
    return layers or SHAPES[shapes][0]


def kept(count: int, first: int = 0) -> list[int]:
    """The student's layers of so many: a quarter is removed, evenly, none of the first ones."""
    removed = max(1, count // 4)
    apart = (count - first) / removed
    return sorted({*range(count)} - {first + int((i + 0.5) * apart) for i in range(removed)})


def model_config(shapes: str, layers: int | None = None):
    """e3jax's ModelConfig of the dense model."""
    from e3jax.models.config import Experts, ModelConfig

    _, width, mlp, heads, kv_heads, tied = SHAPES[shapes]
    count = depth(shapes, layers)
    return ModelConfig(
        family="qwen3", num_layers=count, width=width, mlp_width=mlp, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=128, vocab_size=VOCAB, max_position=40_960, norm_eps=1e-6,
        tied=tied, windows=(None,) * count, qk_norm=True,
        experts=Experts(*EXPERTS[shapes]) if shapes in EXPERTS else None,
    )  # fmt: skip


def build_peer(shapes: str, layers: int, *, cache: bool = False):
    """transformers' model of so many layers, bfloat16, on the GPU, frozen."""
    import torch
    import transformers

    _, width, mlp, heads, kv_heads, tied = SHAPES[shapes]
    cfg = transformers.Qwen3Config(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        vocab_size=VOCAB, tie_word_embeddings=tied, max_position_embeddings=40_960,
        use_cache=cache,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            cfg, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def run_arm(file: str, arguments: list[str], arm: str) -> dict:
    """What an arm of a study measured, in a process of its own."""
    return timing.run_arm([sys.executable, file, *arguments, "--arm", arm])


def timed(step, synchronise) -> tuple[float, list[float]]:
    """Seconds of the first call, and of those after the warm-up."""
    begun = time.perf_counter()
    step()
    synchronise()
    first = time.perf_counter() - begun
    seconds = []
    for number in range(WARM - 1 + STEPS):
        begun = time.perf_counter()
        step()
        synchronise()
        if number >= WARM - 1:
            seconds.append(time.perf_counter() - begun)
    return first, seconds
