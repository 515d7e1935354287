"""Writes families.md from the code and its tests: python docs/make_families.py

A family's line: its name in config.json, models of it, what tells it from llama in a configuration
of its defaults, and the cases that tests/test_families.py and test_hf_load.py compare with
transformers.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from e3jax.hf.facts import Family  # noqa: E402
from e3jax.hf.families import FAMILIES, from_hf  # noqa: E402
from e3jax.models.config import ModelConfig  # noqa: E402
from e3jax.models.params import layer_table  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
# What some have no default for, or a default that shows nothing or of which no model is made.
GIVEN = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
    "granite": dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        2.0,
    ),
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
}
HEAD = """# Families

Written by `python docs/make_families.py` from the code; a test compares it.

`python run.py inspect FOLDER_OR_CONFIG` says how one checkpoint is understood, and why another is
not. A family that is missing can still be cut: `export --from-mask` copies layers of any. How one
is added: [adding-a-family.md](adding-a-family.md). Float8 in blocks (DeepSeek, Qwen) and MXFP4
(gpt-oss) are dequantised when they are read.

For each case, on small random models with every odd feature at work and rows longer than windows
and original context: logits equal transformers' in float32 to 1e-4 of their size, from what
`save_pretrained` wrote; greedy answers with the cache are the same tokens; what is exported of some
of the layers is loaded by transformers and agrees; what we write as config.json transformers reads
as we do. For one family of each kind: the masked model is the sliced one bit for bit, and the
gradient of the gates is that of central differences in float64.

| `model_type` | models | beside what llama has | cases |
|---|---|---|---|
"""


def features(family: Family, cfg: ModelConfig) -> list[str]:
    """What a model of the family's defaults has that llama has not."""
    experts, latent, leaves = cfg.experts, cfg.latent, layer_table(cfg, sparse=False)
    names = {family.tensors[leaf] for leaf in leaves}
    asked = {
        "latent attention": latent is not None,
        "experts": experts is not None,
        "dense layers among them": family.told(cfg).keys()
        & {"first_k_dense_replace", "mlp_only_layers"},
        "groups of experts": experts is not None and experts.groups > 1,
        "shared experts": experts is not None and experts.shared_width > 0,
        "attention sinks": cfg.sinks,
        "norms of queries and keys": cfg.qk_norm,
        "biases of queries, keys and values": cfg.qkv_bias,
        "a window": any(cfg.windows),
        "windows in some layers": "layer_types" in family.told(cfg),
        "soft caps": cfg.attention_cap or cfg.logits_cap,
        "norms about the mean": cfg.norm == "layer",
        "norms after attention and mlp": cfg.norms == "after",
        "norms before and after": cfg.norms == "around",
        "attention and mlp in parallel": cfg.parallel,
        "no gate in the mlp": not cfg.gated,
        "scaled embeddings": cfg.embed_scale != 1.0,
        "scaled residuals": cfg.residual_scale != 1.0,
        "scaled logits": cfg.logits_scale != 1.0,
        "several matrices in a tensor": len(names) < len(leaves),
        "several ropes": len(set(cfg.ropes) - {None}) > 1,
        "layers without rope": None in cfg.ropes,
        "a part of each head turned": cfg.turned is not None,
        "neighbours turned together": cfg.rope.interleaved,
        "a tied head": cfg.tied,
        f"read as {family.exported_as}": family.exported_as,
        "layers that draft tokens left out": family.drafts,
    }
    return [name for name, has in asked.items() if has]


def cases(name: str) -> list[str]:
    import test_families
    import test_hf_load

    found = {**test_hf_load.CASES, **test_families.CASES}
    return [case for case, (family, _) in found.items() if family == name]


def page() -> str:
    lines = []
    for name, family in sorted(FAMILIES.items()):
        cfg = from_hf({"model_type": name, **GIVEN.get(name, {})}, name)
        checked = cases(family.exported_as or name)
        row = (f"`{name}`", family.models, ", ".join(features(family, cfg)), ", ".join(checked))
        lines.append(f"| {' | '.join(row)} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
