"""config.json and weights of every family as they are stored: real, old and quantised ones."""

import gzip
import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from e3jax import mesh
from e3jax.errors import UserError
from e3jax.hf import dequantise
from e3jax.hf.cut import cut_config
from e3jax.hf.export import export
from e3jax.hf.families import FAMILIES, from_hf, read_config, to_hf
from e3jax.hf.folders import source_dtype, stored_tensors
from e3jax.hf.load import load_params
from e3jax.hf.tensors import tensor_table
from e3jax.models import decoder
from hf_tiny import (
    SHARED,
    SIZES,
    assert_same_logits,
    edit_json,
    model_logits,
    our_logits,
    random_tokens,
    rewrite,
    save_tiny,
    torch_logits,
)
from test_families import CASES

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_transformers_defaults(family):
    """The model of an empty config.json has as many parameters as transformers'."""
    if FAMILIES[family].exported_as:
        pytest.skip("another name, which transformers does not know")
    # Without defaults, or with some of which transformers makes no model.
    needed = {
        "deepseek_v2": {"num_experts_per_tok": 2},
        "glm4_moe": {"head_dim": 128},
        "ministral": {"head_dim": 128},
        "nemotron": {"num_key_value_heads": 48},
    }
    given = needed.get(family, {})
    hf = transformers.AutoConfig.for_model(family, **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    corrected = {name: b for name, b in model.named_buffers() if "correction_bias" in name}
    theirs = sum(w.numel() for w in [*model.parameters(), *corrected.values()])
    assert decoder.count_params(from_hf({"model_type": family, **given}, "x")) == theirs


OLD = {  # in the form of transformers 4
    "gemma3_text": {
        "rope_theta": 1e5,
        "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    },
    "cohere2": {"rope_theta": 5e4, "sliding_window_pattern": 2},
    "exaone4": {"rope_theta": 1e6, "sliding_window_pattern": 3, "sliding_window": 8},
    "smollm3": {
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "rope_theta": 5e6,
    },
    "phi3": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5],
            "long_factor": [1.0, 4.0],
        },
    },
    "glm4": {"rope_theta": 1e5, "partial_rotary_factor": 0.5, "head_dim": 8},
    "stablelm": {"rope_theta": 1e5, "partial_rotary_factor": 0.5},
    "nemotron": {"rope_theta": 1e5, "partial_rotary_factor": 0.25},
    "granite": {"rope_theta": 1e7},
}


@pytest.mark.parametrize("family", OLD)
def test_old_form_means_what_transformers_reads(family):
    given = {"model_type": family, **SIZES, **OLD[family]}
    cfg, hf = from_hf(given, "x"), transformers.AutoConfig.for_model(**given)
    assert cfg == from_hf(hf.to_dict(), "x")


REAL = ("google--gemma-2-2b", "google--gemma-3-1b-it", "microsoft--phi-4")


@pytest.mark.parametrize("name", REAL)
def test_real_configs(name):
    """The tensors are those of transformers' model, and a cut says which layers stay."""
    folder = SHARED / "configs" / name
    if not folder.exists():
        pytest.skip("no ../shared/configs")
    cfg, hf = read_config(folder), transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {t.name: t.shape for t in tensor_table(cfg)} == theirs
    assert from_hf(to_hf(cfg), "x") == cfg == from_hf(hf.to_dict(), "x")
    keep = [i for i in range(cfg.num_layers) if i % 3]
    cut = cut_config(json.loads((folder / "config.json").read_text()), keep)
    assert from_hf(cut, "x") == cfg.take_layers(keep)
    types = getattr(transformers.AutoConfig.for_model(**cut), "layer_types", None)
    if types is not None:
        assert types == [hf.layer_types[i] for i in keep] and len(set(types)) == 2


def test_deepseek_r1(tmp_path):
    """Its real configuration and tensor names: all read but scales and the layer that drafts."""
    folder = SHARED / "configs" / "deepseek-ai--DeepSeek-R1"
    if not folder.exists():
        pytest.skip("no ../shared/configs")
    cfg = read_config(folder)
    names = set(json.loads(gzip.decompress((folder / "tensor_names.json.gz").read_bytes())))
    names = {n for n in names if not n.startswith("model.layers.61.")}
    assert {t.name for t in tensor_table(cfg)} == {n for n in names if not n.endswith("_scale_inv")}
    assert cfg.dense == (0, 1, 2) and decoder.count_params(cfg) == 671_026_419_200
    cut = cut_config(json.loads((folder / "config.json").read_text()), [0, 2, *range(10, 61)])
    assert cut["first_k_dense_replace"] == 2 and "auto_map" not in cut


@pytest.mark.slow
def test_kimi_k2_and_layers_that_draft_tokens(tmp_path, caplog):
    """DeepSeek-V3 by another name; the layer behind the last is left out, and a line says so."""
    family, changes = CASES["deepseek_v3"]
    folder = save_tiny(tmp_path / "kimi", family, **changes)
    tokens = random_tokens(96, 9)
    wanted = torch_logits(folder, tokens)
    draft = {"model.layers.3.eh_proj.weight": torch.ones(32, 64)}
    rewrite(folder, lambda tensors: tensors.update(draft))
    told = {
        "model_type": "kimi_k2",
        "num_nextn_predict_layers": 1,
        "auto_map": {"AutoModel": "x.Y"},
    }
    edit_json(folder / "config.json", lambda c: c.update(told))
    with caplog.at_level("INFO", "e3jax"):
        assert_same_logits(our_logits(folder, tokens), wanted)
    assert "1 layer(s) behind the last one only draft tokens ahead" in caplog.text
    cfg, keep = read_config(folder), [0, 2]
    params = decoder.take_layers(load_params(folder, cfg), cfg, keep)
    out = export(params, keep, cfg.take_layers(keep), folder, tmp_path / "cut", card="")
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["num_nextn_predict_layers"]) == ("deepseek_v3", 0)
    assert "auto_map" not in config and config["first_k_dense_replace"] == 1
    ours = model_logits(params, cfg.take_layers(keep), tokens)
    assert_same_logits(ours, torch_logits(out, tokens))
    rewrite(folder, lambda t: t.update({"model.layers.4.eh_proj.weight": torch.ones(32, 64)}))
    with pytest.raises(UserError, match=r"unknown: model\.layers\.4\.eh_proj"):
        load_params(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_experts_on_several_devices_are_the_same_files(tmp_path, name):
    """Read and written by eight devices that share the experts, to the byte."""
    family, changes = CASES[name]
    changes = {**changes, "num_local_experts": 8} if name == "gpt_oss" else changes
    folder = save_tiny(tmp_path / "whole", family, **changes)
    cfg, keep = read_config(folder), [0, 2]
    for sizes in ((1, 1, 1), (1, 2, 4)):
        with jax.set_mesh(mesh.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])):
            params = decoder.take_layers(load_params(folder, cfg), cfg, keep)
            out = tmp_path / "x".join(map(str, sizes))
            export(params, keep, cfg.take_layers(keep), folder, out, card="")
    one, eight = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("1x1x1", "1x2x4")
    )
    assert one == eight and len(one) > 10_000


def test_fp8_blocks_are_dequantised(tmp_path):
    """Float8 with a scale for each 128 x 128 block, as DeepSeek stores it; sizes not multiples."""
    sizes = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 2}
    folder = save_tiny(tmp_path / "fp8", "qwen3", torch.bfloat16, **sizes)
    whole = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}

    def quantise(tensors):
        for name in [n for n in tensors if "proj.weight" in n]:
            rows, columns = (-(-size // 128) for size in tensors[name].shape)
            scale = torch.rand(rows, columns) + 0.5
            each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            each = each[: tensors[name].shape[0], : tensors[name].shape[1]]
            tensors[name] = (tensors[name].float() / each).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            whole[name] = tensors[name].float() * each

    rewrite(folder, quantise)
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=quantized))
    assert source_dtype(folder) == "bfloat16"
    cfg = read_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    for i in range(2):
        for leaf, name in (("gate", "mlp.gate_proj"), ("o", "self_attn.o_proj")):
            want = whole[f"model.layers.{i}.{name}.weight"].numpy()
            np.testing.assert_array_equal(params["layers"][leaf][i].reshape(want.shape), want)
    with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
        spread = load_params(folder, cfg, jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), jax.device_get(params))
    out = export(params, [0, 1], cfg, folder, tmp_path / "out", card="")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert_same_logits(
        our_logits(out, random_tokens(96, 9)), torch_logits(out, random_tokens(96, 9))
    )


def test_mxfp4_is_dequantised(tmp_path):
    """Against transformers' own unpacking: two numbers a byte, an exponent for 32 of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = torch.as_tensor(rng.integers(0, 256, (3, 10, 2, 16), dtype=np.uint8))
    scales = torch.as_tensor(rng.integers(110, 140, (3, 10, 2), dtype=np.uint8))
    want = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    (stored,) = dequantise.with_scales(stored_tensors(tmp_path)).values()
    assert (stored.name, stored.shape, dequantise.is_sound(stored)) == ("x", (3, 64, 10), True)
    found = np.concatenate([dequantise.part(stored, n) for n in range(dequantise.parts(stored))])
    np.testing.assert_array_equal(found, want.numpy())


def test_page_of_families_is_that_of_the_code():
    made = runpy.run_path(str(ROOT / "docs" / "make_families.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "docs/make_families.py"
