"""export --from-mask: the same model as an export from memory, and any family, without jax."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from e3jax import cli
from e3jax.errors import UserError
from e3jax.hf import copying
from e3jax.hf.cut import cut_config, cut_names
from e3jax.hf.export import export
from e3jax.hf.families import read_config
from e3jax.hf.folders import INDEX
from e3jax.hf.load import load_params
from e3jax.models import decoder
from hf_tiny import edit_json, save_tiny

ROOT = pathlib.Path(__file__).parent.parent
KEEP = [0, 2, 3]
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {**WINDOWS, "layer_types": None}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


def write_mask(tmp_path, keep=KEEP, num_layers=5, **more):
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({"keep": keep, "num_layers": num_layers, **more}))
    return path


def run(tmp_path, source, *overrides, mask=None, code=0):
    mask = mask or write_mask(tmp_path)
    where = [f"model.path={source}", f"out={tmp_path / 'out'}"]
    assert cli.main(["export", "--from-mask", str(mask), *where, *overrides]) == code
    return tmp_path / "out"


def left(tmp_path):
    return {p.name for p in tmp_path.iterdir()} - {"source", "mask.json"}


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_same_bytes_as_an_export_from_memory(tmp_path, family, changes):
    source = save_tiny(
        tmp_path / "source", family, torch.bfloat16, "20KB", num_hidden_layers=5, **changes
    )
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("terms")
    out = run(tmp_path, source, "export.shard_gb=0.00003")
    cfg = read_config(source)
    params = decoder.take_layers(load_params(source, cfg), cfg, KEEP)
    options = {"card": "", "shard_bytes": 30_000}
    other = export(params, KEEP, cfg.take_layers(KEEP), source, tmp_path / "memory", **options)
    names = {p.name for p in other.iterdir()}
    assert {p.name for p in out.iterdir()} == names | {"e3jax.json"} and len(names) > 5
    different = [n for n in names if (out / n).read_bytes() != (other / n).read_bytes()]
    assert set(different) <= {"README.md", INDEX}
    maps = [json.loads((f / INDEX).read_text())["weight_map"] for f in (out, other)]
    assert maps[0] == maps[1]
    card = (out / "README.md").read_text()
    assert "not trained since" in card and "chosen by a mask of unknown origin" in card


# ---- a family that cannot be loaded, with quantised weights


def moe(tmp_path, **config):
    """Five layers of a mixture of experts, in two shards: layer i's tensors are full of i."""
    source = tmp_path / "source"
    source.mkdir()
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i in range(5):
        shard = shards["a.safetensors" if i < 3 else "b.safetensors"]
        for expert in range(3):
            name = f"model.layers.{i}.mlp.experts.{expert}.w1"
            shard[f"{name}.qweight"] = np.full((4, 3 + i), 10 * i + expert, np.int32)
            shard[f"{name}.scale"] = np.full(3, i, np.uint8)
        shard[f"model.layers.{i}.norm.weight"] = np.full(7, i, np.float32)
    shards["a.safetensors"]["model.embed_tokens.weight"] = np.arange(11, dtype=np.int8)
    shards["b.safetensors"]["mtp.layers.0.weight"] = np.arange(2, dtype=np.int64)
    for name, tensors in shards.items():
        save_numpy(tensors, source / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "deepseek_v4", "num_hidden_layers": 5, "num_experts": 3, **config}
    (source / "config.json").write_text(json.dumps(config))
    return source


QUANTIZED = {
    "quant_method": "gptq",
    "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(5))],
    "ignore": ["re:.*layers\\.3\\.self_attn.*", "re:.*layers\\.1\\..*", "re:.*layers\\.\\d+\\.x"],
    "dynamic": {"-:model\\.layers\\.4\\.": {}, "+:model\\.layers\\.2\\.": {"bits": 8}},
}


def test_family_unknown_and_quantised(tmp_path):
    source = moe(
        tmp_path,
        first_k_dense_replace=2,
        mlp_only_layers=[1, 3],
        layer_types=list("abcde"),
        auto_map={"AutoModel": "modeling_x.X"},
        quantization_config=QUANTIZED,
        rope_scaling={"short_factor": [1, 2, 3, 4, 5]},
    )
    (source / "modeling_x.py").write_text("import os")
    (source / "quantize_config.json").write_text('{"skip": ["model.layers.3.x"]}')
    out = run(tmp_path, source)
    config = json.loads((out / "config.json").read_text())
    quantized = config.pop("quantization_config")
    assert config == {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 3,
        "num_experts": 3,
        "first_k_dense_replace": 1,
        "mlp_only_layers": [2],
        "layer_types": ["a", "c", "d"],
        "rope_scaling": {"short_factor": [1, 2, 3, 4, 5]},
    }
    gates = [f"model.layers.{i}.mlp.gate" for i in range(3)]
    assert quantized["modules_to_not_convert"] == ["lm_head", *gates]
    assert quantized["ignore"] == ["re:.*layers\\.2\\.self_attn.*", "re:.*layers\\.\\d+\\.x"]
    assert quantized["dynamic"] == {"+:model\\.layers\\.1\\.": {"bits": 8}}
    assert json.loads((out / "quantize_config.json").read_text()) == {"skip": ["model.layers.2.x"]}
    assert not list(out.glob("*.py"))
    tensors = load_file(out / "model.safetensors")
    assert len(tensors) == 3 * 7 + 2
    for new, old in enumerate(KEEP):
        name = f"model.layers.{new}.mlp.experts.2.w1"
        assert tensors[f"{name}.qweight"].shape == (4, 3 + old)
        assert (tensors[f"{name}.qweight"] == 10 * old + 2).all()
        assert tensors[f"{name}.scale"].dtype == torch.uint8
    assert tensors["mtp.layers.0.weight"].tolist() == [0, 1]


def test_8_bit_floats_of_a_known_family(tmp_path):
    source = save_tiny(tmp_path / "source", "qwen3", torch.bfloat16, num_hidden_layers=5)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if "proj.weight" in n]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"fmt": "e4m3"}))
    written = load_file(run(tmp_path, source) / "model.safetensors")
    old, new = (f"model.layers.{i}.mlp.up_proj.weight" for i in (3, 2))
    assert written[new].dtype == torch.float8_e4m3fn
    assert torch.equal(written[new].view(torch.uint8), tensors[old].view(torch.uint8))
    assert len(written) == 3 + 3 * (len(tensors) - 3) // 5


def test_layers_that_draft_tokens_follow(tmp_path):
    source = moe(
        tmp_path, num_hidden_layers=4, num_nextn_predict_layers=1, compress_ratios=[*"abcde"]
    )
    out = run(tmp_path, source, mask=write_mask(tmp_path, [1, 3], 4))
    written = load_file(out / "model.safetensors")
    assert [written[f"model.layers.{i}.norm.weight"][0] for i in range(3)] == [1, 3, 4]
    assert json.loads((out / "config.json").read_text())["compress_ratios"] == ["b", "d", "e"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern=6"),
        ({"unheard_of": [1, 2, 3, 4, 5]}, "unheard_of"),
        ({"full_attn_layers": [1, 3]}, "full_attn_layers"),
        ({"layer_types": ["a"]}, "layer_types has 1 entries"),
        ({"model_type": "qwen3_next"}, "qwen3_next without layer_types"),
        ({"num_hidden_layers": None, "text_config": {"num_hidden_layers": 5}}, "text_config"),
        ({"quantization_config": {"ignore": ["re:.*layers\\.(0|1)\\.x"]}}, "cannot be renumbered"),
        ({"quantization_config": {"ignore": ["re:.*\\.1\\.x"]}}, "cannot be renumbered"),
        ({"quantization_config": {"ignore": ["model.layers.1*"]}}, "may name several layers"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path, capsys, config, message):
    run(tmp_path, moe(tmp_path, **config), code=2)
    assert message in capsys.readouterr().err
    assert left(tmp_path) == set()


def test_what_only_looks_like_a_layer_number():
    names = ["mtp.layers.1.x", "model.embed_tokens", "model.layers.*.gate", "re:.*w1"]
    assert cut_names(names, [0], "x") == names
    config = {"num_hidden_layers": 2, "eos_token_id": [1, 2], "architectures": ["a", "b"]}
    config |= {"layer_norm_eps": 1.0, "decoder_sparse_step": 1, "full_attention_interval": 4}
    config |= {"layer_types": ["a", "b"]}
    cut = cut_config(config, [1])
    assert cut == {**config, "num_hidden_layers": 1, "layer_types": ["b"]}


# ---- bad input, and failures


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"num_layers": 6}, "a mask of 6 layers, and the model has 5"),
        ({"keep": [0, 5]}, "keep is [0, 5]"),
        ({"keep": [2, 1]}, "ascending"),
        ({"keep": [1, 1]}, "ascending"),
        ({"keep": []}, "keep is []"),
        ({"keep": [True]}, "not a mask file"),
        ({"keep": "all"}, "not a mask file"),
    ],
)
def test_bad_masks(tmp_path, capsys, mask, message):
    run(tmp_path, moe(tmp_path), mask=write_mask(tmp_path, **mask), code=2)
    assert message in capsys.readouterr().err
    assert left(tmp_path) == set()


def damage_index(source):
    def change(index):
        index["weight_map"] = {n: "../x.safetensors" for n in index["weight_map"]}

    edit_json(source / INDEX, change)


def truncate(source):
    path = source / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_index, "outside the folder"),
        (truncate, "truncated"),
        (lambda source: (source / "b.safetensors").unlink(), "missing: b.safetensors"),
        (lambda source: edit_json(source / "config.json", lambda c: c.update(num_hidden_layers=4)),
         "weights of later ones"),
        (lambda source: (source.parent / "out").mkdir() or (source.parent / "out/x").touch(),
         "not empty"),
    ],
)  # fmt: skip
def test_unsound_checkpoints(tmp_path, capsys, damage, message):
    source = moe(tmp_path)
    damage(source)
    depth = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    run(tmp_path, source, mask=write_mask(tmp_path, num_layers=depth), code=2)
    assert message in capsys.readouterr().err
    assert left(tmp_path) <= {"out"}


def test_mask_of_another_checkpoint_is_told(tmp_path, caplog):
    source = moe(tmp_path)
    out = run(tmp_path, source, mask=write_mask(tmp_path, checkpoint="0123456789abcdef"))
    assert "found on another checkpoint (0123456789abcdef)" in caplog.text
    own = json.loads((out / "e3jax.json").read_text())["model"]
    caplog.clear()
    shutil.rmtree(out)
    run(tmp_path, source, mask=write_mask(tmp_path, checkpoint=own))
    assert "another checkpoint" not in caplog.text


def test_dtype_and_several_processes_are_refused(tmp_path, capsys):
    run(tmp_path, moe(tmp_path), "export.dtype=float32", code=2)
    assert "export.dtype" in capsys.readouterr().err
    for wrong in (["--from-mask", "x", "--distributed"], []):
        with pytest.raises(SystemExit):
            cli.main(["export", *wrong])


def test_disks(tmp_path, monkeypatch, capsys):
    source = moe(tmp_path)
    real = copying._copy_range
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(copying, "_copy_range", full)
    run(tmp_path, source, code=2)
    assert "disk is full" in capsys.readouterr().err and left(tmp_path) == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    run(tmp_path, source, code=2)
    assert "99 free" in capsys.readouterr().err and left(tmp_path) == set()


@pytest.mark.parametrize("kernel", [True, False])
def test_what_the_disk_returns_is_compared(tmp_path, monkeypatch, capsys, kernel):
    """With the kernel's copying, and where it cannot."""
    source = moe(tmp_path)
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range")
    shutil.rmtree(run(tmp_path, source))
    real = copying._copy

    def flip(path, tensors):
        real(path, tensors)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(copying, "_copy", flip)
    run(tmp_path, source, code=2)
    assert "is not the source's" in capsys.readouterr().err and left(tmp_path) == set()


def test_source_that_becomes_shorter(tmp_path):
    source = moe(tmp_path)
    plan = copying.make_plan(source, KEEP)
    (source / "b.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="became shorter"):
        copying.write(plan, tmp_path / "out")
    assert left(tmp_path) == set()


def command(tmp_path, source, before=""):
    arguments = ["export", "--from-mask", str(write_mask(tmp_path))]
    arguments += [f"model.path={source}", f"out={tmp_path / 'out'}"]
    program = f"import sys\nfrom e3jax import cli\n{before}\ncode = cli.main({arguments!r})\n"
    program += "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'transformers'} & set(sys.modules)\n"
    program += "assert not heavy, heavy\nsys.exit(code)"
    return [sys.executable, "-c", program]


def test_without_jax(tmp_path):
    source = save_tiny(tmp_path / "source", "llama", num_hidden_layers=5)
    done = subprocess.run(command(tmp_path, source), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_config(tmp_path / "out").num_layers == 3


def copying_now(tmp_path, source):
    """The program while it copies: before each range it says so and waits to be told to go on."""
    slow = "from e3jax.hf import copying\nreal = copying._copy_range\ndef wait(*arguments):\n"
    slow += "    print('x', flush=True)\n    sys.stdin.read()\n    return real(*arguments)\n"
    slow += "copying._copy_range = wait"
    process = subprocess.Popen(
        command(tmp_path, source, slow), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    return process


def test_a_second_export_while_the_first_copies_is_refused(tmp_path, capsys):
    """And takes nothing from it; what a killed one left the next one removes."""
    source = moe(tmp_path)
    process = copying_now(tmp_path, source)
    before = left(tmp_path)
    run(tmp_path, source, code=2)
    told = capsys.readouterr().err
    assert f"{tmp_path}/out: another run is at work there (process {process.pid} of " in told
    assert left(tmp_path) == before and len(before) == 2
    process.communicate()  # it goes on
    assert process.returncode == 0 and left(tmp_path) == {"out"}
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")

    process = copying_now(tmp_path, source)
    process.kill()
    process.communicate()
    assert left(tmp_path).isdisjoint(before - {".out.lock"}) and len(left(tmp_path)) == 2
    out = run(tmp_path, source)
    assert left(tmp_path) == {"out"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_sigterm_leaves_nothing(tmp_path):
    process = copying_now(tmp_path, moe(tmp_path))
    assert any(name.startswith(".out.partial-") for name in left(tmp_path))
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert process.wait() == 128 + signal.SIGTERM and time.monotonic() - begun < 20
    assert left(tmp_path) == set()
