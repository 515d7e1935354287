"""Checkpoints out: transformers loads the same model from them, and a failure leaves nothing."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from e3jax import mesh
from e3jax.errors import UserError
from e3jax.hf import safetensors
from e3jax.hf.export import export, export_new
from e3jax.hf.families import from_hf, read_config
from e3jax.hf.folders import INDEX
from e3jax.hf.load import load_params
from e3jax.models import decoder
from hf_tiny import (
    SHARED,
    SIZES,
    assert_same_logits,
    edit_json,
    model_logits,
    our_logits,
    random_tokens,
    save_tiny,
    torch_logits,
)

KEEP = [0, 2, 3]
WINDOWS = {
    "num_hidden_layers": 5,
    "use_sliding_window": True,
    "sliding_window": 8,
    "layer_types": [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],
}
CASES = {
    "llama": ("llama", {"num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"num_hidden_layers": 5, "sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {**WINDOWS, "layer_types": None, "max_window_layers": 3}),
    "qwen3": ("qwen3", WINDOWS),
    "qwen3-tied": ("qwen3", {**WINDOWS, "tie_word_embeddings": True}),
}
CARRIED = {
    "generation_config.json": b'{"eos_token_id": [2, 3],\n\n "temperature": 0.6}',
    "tokenizer.json": '{"model": {"vocab": {"é": 0}}}\r\n'.encode(),
    "tokenizer_config.json": b"{ }",
    "tokenizer.model": bytes(range(256)),
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache License",
}


def source_model(tmp_path, family, **options):
    """A checkpoint with everything that goes with one, and what is not to be carried on."""
    folder = save_tiny(tmp_path / "source", family, **options)
    for name, data in CARRIED.items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe source\n")
    (folder / "modeling_custom.py").write_text("import os")
    return folder


def pruned(folder, keep=KEEP, dtype=None):
    cfg = read_config(folder)
    return decoder.take_layers(load_params(folder, cfg, dtype), cfg, keep), cfg.take_layers(keep)


def run_export(folder, out, keep=KEEP, load_dtype=None, **options):
    params, cfg = pruned(folder, keep, load_dtype)
    return export(params, keep, cfg, folder, out, card="# card\n", **options)


def torch_pruned_logits(folder, keep, tokens):
    """The independent truth: layers taken out of transformers' own model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
    model.config.num_hidden_layers = len(keep)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in keep]
    with torch.no_grad():
        return model(torch.as_tensor(tokens), use_cache=False).logits.numpy()


def left_behind(tmp_path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir() if p.name != "source")


@pytest.mark.cases(1)
@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_transformers_loads_the_pruned_model(tmp_path, family, changes):
    folder = source_model(tmp_path, family, **changes)
    out = run_export(folder, tmp_path / "out", shard_bytes=30_000)
    tokens = random_tokens(96, 30)
    truth = torch_pruned_logits(folder, KEEP, tokens)
    assert_same_logits(torch_logits(out, tokens), truth)
    assert_same_logits(our_logits(out, tokens), truth)
    assert np.abs(truth - torch_pruned_logits(folder, [0, 1, 2], tokens)).max() > 0.1
    assert left_behind(tmp_path) == ["out"]

    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    inside = {file: set(load_file(out / file)) for file in files}
    for name, file in weight_map.items():
        assert [f for f in files if name in inside[f]] == [file]
    assert set(weight_map) == set().union(*inside.values())
    assert all((out / file).stat().st_size < 34_000 for file in files)
    size = json.loads((out / INDEX).read_text())["metadata"]["total_size"]
    assert size == 4 * decoder.count_params(read_config(out))


def test_greedy_generation_agrees(tmp_path):
    folder = source_model(tmp_path, "qwen3", **WINDOWS)
    (folder / "generation_config.json").unlink()
    params, cfg = pruned(folder)
    out = run_export(folder, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    prompt = random_tokens(96, 6)
    theirs = model.generate(torch.as_tensor(prompt), max_new_tokens=12, do_sample=False)
    tokens = np.pad(prompt, ((0, 0), (0, 12)))  # later tokens do not matter: the mask is causal
    for t in range(6, 18):
        tokens[:, t] = model_logits(params, cfg, tokens)[:, t - 1].argmax(-1)
    np.testing.assert_array_equal(theirs.numpy(), tokens)


def test_files_around_the_weights(tmp_path):
    folder = source_model(tmp_path, "llama", dtype=torch.bfloat16, num_hidden_layers=5)
    out = run_export(folder, tmp_path / "out")
    expected = {**CARRIED, "README.md": b"# card\n"}
    assert {n: (out / n).read_bytes() for n in expected} == expected
    rest = {p.name for p in out.iterdir()} - set(expected)
    assert rest == {"config.json", "model.safetensors"}
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    assert after == {**before, "num_hidden_layers": 3}
    assert after["dtype"] == "bfloat16" and after["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_untouched_weights_are_the_sources_bytes(tmp_path, dtype):
    folder = source_model(tmp_path, "qwen2", dtype=dtype, num_hidden_layers=5)
    # Through float32, as the masters of training are.
    out = run_export(folder, tmp_path / "out", load_dtype=jnp.float32)
    source, written = (load_file(f / "model.safetensors") for f in (folder, out))
    for new, old in enumerate(KEEP):
        for name in [n for n in source if n.startswith(f"model.layers.{old}.")]:
            other = written.pop(name.replace(f"layers.{old}.", f"layers.{new}."))
            assert other.dtype == dtype and torch.equal(other, source[name])
    assert set(written) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(torch.equal(written[name], source[name]) for name in written)


@pytest.mark.parametrize(
    ("dtype", "torch_type"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_asked_for(tmp_path, dtype, torch_type, key):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    edit_json(folder / "config.json", lambda c: c.update({key: c.pop("dtype")}))
    out = run_export(folder, tmp_path / "out", dtype=dtype)
    config = json.loads((out / "config.json").read_text())
    assert config[key] == dtype and not {"dtype", "torch_dtype"} - {key} & set(config)
    written, source = (load_file(f / "model.safetensors") for f in (out, folder))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(written[name], source[name].to(torch_type))


def test_transformers_4_form_is_kept(tmp_path):
    folder = source_model(tmp_path, "qwen2", **{**WINDOWS, "layer_types": None})

    def old(config):
        for key in ("rope_parameters", "dtype", "layer_types"):
            del config[key]
        config |= {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float32"}
        config["max_window_layers"] = 3

    edit_json(folder / "config.json", old)
    out = run_export(folder, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert "rope_parameters" not in config and config["rope_theta"] == 5e5
    assert config["max_window_layers"] == 2
    tokens = random_tokens(96, 30)
    assert_same_logits(torch_logits(out, tokens), torch_pruned_logits(folder, KEEP, tokens))


def test_tied_writes_the_embedding_once(tmp_path):
    folder = source_model(tmp_path, "qwen3", **WINDOWS, tie_word_embeddings=True)
    out = run_export(folder, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_export_from_a_mesh_is_the_same_bytes(tmp_path):
    folder = source_model(tmp_path, "qwen3", **WINDOWS)
    plain = run_export(folder, tmp_path / "plain")
    with jax.set_mesh(mesh.make_mesh(model=2 if jax.device_count() % 2 == 0 else 1)):
        spread = run_export(folder, tmp_path / "spread")
    name = "model.safetensors"
    assert (plain / name).read_bytes() == (spread / name).read_bytes()


def test_real_checkpoint(tmp_path):
    folder = SHARED / "models" / "chain-math-24l"
    if not folder.is_dir():
        pytest.skip("no ../shared/models")
    keep = [i for i in range(24) if i not in (5, 9, 10, 17, 18, 21)]
    out = run_export(folder, tmp_path / "out", keep)
    tokens = random_tokens(96, 48)
    assert_same_logits(torch_logits(out, tokens), torch_pruned_logits(folder, keep, tokens))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_model_from_scratch(tmp_path, family):
    cfg = from_hf({"model_type": family, **SIZES, "head_dim": 16, "sliding_window": 8}, "x")
    params = decoder.init_params(jax.random.key(0), cfg)
    params = jax.tree.map(lambda w: w * 10, params)
    tokenizer = tmp_path / "source"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "generation_config.json").write_text("not to be carried on")
    out = export_new(params, cfg, tokenizer, tmp_path / "out", card="# new", bos=1, eos=2, pad=0)
    assert read_config(out) == cfg
    tokens = random_tokens(96, 20)
    assert_same_logits(model_logits(params, cfg, tokens), torch_logits(out, tokens))
    generation = transformers.GenerationConfig.from_pretrained(out)
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert ids == (1, 2, 0)
    assert (out / "tokenizer.json").read_text() == "{}"


# ---- nothing is left behind


class Stop(BaseException):
    """Like Ctrl-C."""


@pytest.mark.parametrize("error", [UserError("differs"), RuntimeError("bug"), Stop()])
def test_failed_verification_leaves_nothing(tmp_path, error):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    seen = []

    def verify(path):
        seen.append(path)
        assert read_config(path).num_layers == 3 and (path / "README.md").is_file()
        assert path.name.startswith(".out.partial-") and not (tmp_path / "out").exists()
        raise error

    with pytest.raises(type(error)):
        run_export(folder, tmp_path / "out", verify=verify)
    assert seen and left_behind(tmp_path) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        run_export(folder, tmp_path / "out", shard_bytes=30_000)
    assert left_behind(tmp_path) == []


def test_small_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    with pytest.raises(UserError) as error:
        run_export(folder, tmp_path / "new" / "out")
    weights = 4 * decoder.count_params(read_config(folder).take_layers(KEEP))
    needed = int(str(error.value).split("needs ")[1].split()[0].replace(",", ""))
    assert "1,234 free" in str(error.value) and weights < needed < 2 * weights
    assert left_behind(tmp_path) == []


def test_what_the_disk_returns_is_compared(tmp_path, monkeypatch):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    write = safetensors.write_file

    def flip(path, *rest):
        write(path, *rest)
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(safetensors, "write_file", flip)
    with pytest.raises(UserError, match="not what was written"):
        run_export(folder, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_weights_that_the_dtype_cannot_hold(tmp_path):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    params, cfg = pruned(folder)
    params["layers"]["up"] = params["layers"]["up"].at[1, 2, 3].set(1e6)
    options = {"card": "", "dtype": "float16"}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*float16"):
        export(params, KEEP, cfg, folder, tmp_path / "out", **options)
    assert left_behind(tmp_path) == []
    with pytest.raises(UserError, match=r"export\.dtype is int8"):
        run_export(folder, tmp_path / "out", dtype="int8")


def test_output_folder_in_use(tmp_path):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    out = tmp_path / "out"
    out.mkdir()
    run_export(folder, out)  # empty: fine
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UserError, match="not empty"):
        run_export(folder, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_output_folder_that_cannot_be(tmp_path):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    with pytest.raises(UserError, match=r"config\.json/out: cannot be written: "):
        run_export(folder, folder / "config.json" / "out")
    with pytest.raises(UserError, match="not empty"):
        run_export(folder, folder / "config.json")


def test_partial_folder_of_a_killed_run_is_removed(tmp_path):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    (tmp_path / ".out.partial-0badcafe").mkdir()
    run_export(folder, tmp_path / "out")
    assert left_behind(tmp_path) == ["out"]


def test_link_out_of_the_source_is_not_carried(tmp_path):
    folder = source_model(tmp_path, "llama", num_hidden_layers=5)
    (folder / "tokenizer_extra.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"tokenizer_extra\.json"):
        run_export(folder, tmp_path / "out")
    assert left_behind(tmp_path) == []
