"""`inspect`: counts that the models' makers published, and what is said of what cannot be read."""

import json
import re

import pytest

from e3jax.cli import main
from hf_tiny import SHARED, edit_json, rewrite, save_tiny

# Parameters and those that a token meets, in billions, from the models' papers and cards.
PUBLISHED = {
    "deepseek-ai--DeepSeek-R1": (671, 37),
    "Qwen--Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen--Qwen3-235B-A22B": (235, 22),
    "mistralai--Mixtral-8x7B-v0.1": (46.7, 12.9),
    "Qwen--Qwen3-32B": (32.8, 32.8),
    "moonshotai--Kimi-K2-Instruct": (1026, 32),
}


@pytest.mark.parametrize(("name", "counts"), PUBLISHED.items(), ids=PUBLISHED)
def test_published_counts(name, counts, capsys):
    path = SHARED / "configs" / name / "config.json"
    if not path.exists():
        pytest.skip("no ../shared/configs")
    assert main(["inspect", str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    found = re.search(r"parameters ([\d.]+ [GT])(?: \(([\d.]+ G) a token\))?", text)
    assert found is not None
    value = lambda t: float(t.split()[0]) * {"G": 1, "T": 1000}[t.split()[1]]
    assert value(found[1]) == pytest.approx(counts[0], rel=0.01)
    assert value(found[2] or found[1]) == pytest.approx(counts[1], rel=0.04)
    assert "25% removed" in text and "none beside config.json" in text


def test_a_checkpoint_with_its_weights(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model", "deepseek_v3", first_k_dense_replace=1, n_group=1,
                       topk_group=1, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8,
                       q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
                       num_key_value_heads=4, moe_intermediate_size=8)  # fmt: skip
    assert main(["inspect", str(folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "3: 2 with experts, 1 without (0)" in text and "all that config.json asks for" in text
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert main(["inspect", str(folder)]) == 1
    assert "missing: model.norm.weight" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_read(tmp_path, capsys):
    """The reason, and whether its layers can still be copied."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "num_layers": 8}))
    assert main(["inspect", str(tmp_path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "model_type 'odd' is not supported" in out and "can write some of its 8 layers" in out
    edit_json(tmp_path / "config.json", lambda c: c.update(odd_pattern=[1, 2]))
    assert main(["inspect", str(tmp_path)]) == 1
    assert "cannot cut it either" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "not a folder" in capsys.readouterr().err
