"""The model card of an export."""

import pytest
import yaml

from e3jax.hf.card import has_chat_template, model_card, read_license


def test_card():
    license_keys = {"license": "other", "license_name": "x: y", "license_link": "LICENSE"}
    card = model_card(
        name="pruned",
        folder="export",
        base_model="org/base-1.5B",
        license_keys=license_keys,
        config={"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"] * 3},
        chat=True,
        keep=[0, 2, 3],
        num_layers=5,
        chosen_by="the selector z",
        rows=[{"model": "dense", "exact match": 0.98125}, {"model": "a|b", "exact match": 0.5}],
    )
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/base-1.5B"
    assert {key: front[key] for key in license_keys} == license_keys
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    for text in (
        "3 of its 5 decoder layers",
        "the selector z",
        "counted from 0): 0, 2, 3\n",
        "removed layers: 1, 4\n",
        "| model | exact match |\n| --- | --- |\n| dense | 0.9812 |\n| a\\|b | 0.5 |",
        'AutoModelForCausalLM.from_pretrained("export")',
        "transformers serve export",
        '/v1/chat/completions -H "Content-Type: application/json" \\\n  -d \'{"model": "export",',
        "vllm serve export\n",
        "sglang.launch_server --model-path export\n",
        "convert_hf_to_gguf.py export --outfile export.gguf\n",
        "2511.17205",
    ):
        assert text in card


def test_card_of_a_local_raw_model():
    options = {
        "name": "x",
        "folder": "x",
        "config": {},
        "chat": False,
        "keep": [0],
        "num_layers": 2,
        "recovered": False,
        "chosen_by": "y",
    }
    card = model_card(base_model="./runs/a", license_keys={}, **options)
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front and "license" not in front
    assert "not trained" in card and "Figures" not in card
    assert "/v1/completions -H" in card and '"prompt"' in card
    assert "vllm serve" not in card and "Not known to serve it" in card


@pytest.mark.parametrize(
    ("readme", "license_file", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", False, {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: llama3\n---\n",
            True,
            {"license": "other", "license_name": "llama3"},
        ),
        ("# no front matter", True, {"license": "other", "license_link": "LICENSE"}),
        ("---\n: [broken\n---\n", False, {}),
        (None, False, {}),
    ],
)  # fmt: skip
def test_read_license(tmp_path, readme, license_file, expected):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    if license_file:
        (tmp_path / "LICENSE").write_text("terms")
    assert read_license(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer_config.json", '{"chat_template": "x"}', True),
        ("tokenizer_config.json", '{"model_max_length": 8}', False),
        ("tokenizer_config.json", "{broken", False),
        ("chat_template.jinja", "x", True),
        ("config.json", "{}", False),
    ],
)
def test_chat_template(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert has_chat_template(tmp_path) is expected
