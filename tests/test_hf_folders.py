"""Folders that are no sound checkpoint: everything wrong is refused by name; and where one is."""

import json
import struct

import huggingface_hub
import jax.numpy as jnp
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from e3jax.errors import UserError
from e3jax.hf.folders import INDEX
from e3jax.hf.hub import resolve
from e3jax.hf.load import load_params
from hf_tiny import edit_json, rewrite, save_tiny

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def refused(folder, *named: str) -> None:
    with pytest.raises(UserError) as error:
        load_params(folder)
    for word in named:
        assert word in str(error.value)


def test_all_bad_tensors_are_listed_at_once(tmp_path):
    folder = save_tiny(tmp_path, "llama")

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors[HEAD]
        tensors["model.layers.3.input_layernorm.weight"] = torch.ones(32)
        tensors["model.norm.weight"] = torch.ones(31)
        tensors[EMBED] = torch.ones(96, 32, dtype=torch.int8)

    rewrite(folder, change)
    refused(
        folder,
        "missing: model.layers.1.mlp.up_proj.weight, lm_head.weight",
        "unknown: model.layers.3.input_layernorm.weight",
        "model.norm.weight [31] (expected [32])",
        f"{EMBED} I8",
    )


def test_harmless_buffers_of_old_checkpoints_are_ignored(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda t: t.update({name: torch.ones(4)}))
    load_params(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights_are_named(tmp_path, value):
    folder = save_tiny(tmp_path, "llama", torch.bfloat16)
    bad = "model.layers.2.self_attn.o_proj.weight"

    def change(tensors):
        tensors[bad][3, 5] = value
        tensors["model.norm.weight"][0] = value

    rewrite(folder, change)
    refused(folder, f"NaN or infinite weights: {bad}, model.norm.weight")


def test_overflow_of_the_dtype_asked_for_is_named(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    rewrite(folder, lambda t: t["model.norm.weight"].fill_(1e30))
    load_params(folder, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_params(folder, dtype=jnp.float16)


def header(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(path, change) -> None:
    head, data = header(path)
    change(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def cut_offsets(head):
    head["model.norm.weight"]["data_offsets"][1] -= 4


def overlap(head):
    head["model.norm.weight"]["data_offsets"] = [0, 128]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), "5 bytes"),
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "no tensor"),
        (lambda p: p.write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), str(1 << 40)),
        (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"{]"), "broken header"),
        (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "broken header"),
        (lambda p: p.write_bytes(struct.pack("<Q", 17) + b'{"a":{},"a":{}}  '), "twice: a"),
        (lambda p: with_header(p, cut_offsets), "model.norm.weight"),
        (lambda p: with_header(p, overlap), "begins at byte"),
        (lambda p: with_header(p, lambda h: h["model.norm.weight"].pop("dtype")), "dtype"),
    ],
)
def test_damaged_file(tmp_path, damage, named):
    folder = save_tiny(tmp_path, "llama")
    damage(folder / "model.safetensors")
    refused(folder, "model.safetensors", named)


def sharded(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama", shard="20KB")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    return folder, files


def test_missing_and_truncated_shards(tmp_path):
    folder, files = sharded(tmp_path)
    path = folder / files[1]
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, files[1], "truncated")
    path.unlink()
    (folder / files[2]).unlink()
    refused(folder, INDEX, files[1], files[2])


@pytest.mark.parametrize("how", ["parent", "absolute", "subfolder", "link"])
def test_index_may_not_leave_the_folder(tmp_path, how):
    folder, files = sharded(tmp_path)
    outside = tmp_path / "outside.safetensors"
    (folder / files[0]).rename(outside)
    target = {"parent": "../outside.safetensors", "absolute": str(outside), "link": files[0]}
    target = target.get(how, "sub/outside.safetensors")
    if how == "link":
        (folder / files[0]).symlink_to(outside)
    if how == "subfolder":
        (folder / "sub").mkdir()
        outside.rename(folder / target)

    def change(index):
        names = index["weight_map"]
        index["weight_map"] = {n: target if f == files[0] else f for n, f in names.items()}

    edit_json(folder / INDEX, change)
    refused(folder, repr(target), "outside the folder")


def test_links_of_the_hub_cache_are_followed(tmp_path):
    folder, files = sharded(tmp_path)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for n, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(n))
        (snapshot / path.name).symlink_to(f"../../blobs/{n}")
    assert len(load_params(snapshot)) == 4
    (snapshot / files[0]).unlink()
    (snapshot / files[0]).symlink_to("/etc/hostname")
    refused(snapshot, files[0], "outside the folder")


def test_index_and_shards_must_agree(tmp_path):
    folder, files = sharded(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    left_out = "model.layers.1.input_layernorm.weight"

    def change(new):
        new["weight_map"]["model.norm.weight"] = files[0]
        del new["weight_map"][left_out]

    edit_json(folder / INDEX, change)
    refused(
        folder,
        f"not in the shard that {INDEX} names: model.norm.weight",
        f"in a shard but not in {INDEX}: {left_out}",
    )
    (folder / INDEX).write_text(json.dumps(index))
    other = next(f for n, f in index["weight_map"].items() if f != index["weight_map"][EMBED])
    tensors = load_file(folder / other)
    save_file({**tensors, EMBED: torch.ones(96, 32)}, folder / other)
    refused(folder, f"duplicate (in several shards): {EMBED}")
    (folder / INDEX).write_text('{"weight_map": {"a": 1}}')
    refused(folder, INDEX, "weight_map")


def test_no_weights(tmp_path):
    folder, files = sharded(tmp_path)
    (folder / INDEX).unlink()
    refused(folder, INDEX, files[0])
    for file in files:
        (folder / file).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, "pytorch_model.bin", "pickled weights are not read")


# ---- where it is


def test_resolve_folder(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path
    for wrong in (tmp_path / "config.json", tmp_path / "absent"):
        with pytest.raises(UserError, match="expected a checkpoint folder, `demo` or a hub id"):
            resolve(str(wrong))


def test_resolve_hub_id(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        resolve("some-org/some-model")
    assert "no such folder" in str(error.value) and "hub id" in str(error.value)
    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kwargs: asked.update(name=name, **kwargs) or str(tmp_path),
    )
    assert resolve("some-org/some-model", "v1") == tmp_path
    assert asked["name"] == "some-org/some-model" and asked["revision"] == "v1"
    wanted = ["model.safetensors", INDEX, "tokenizer.model", "chat_template.jinja", "LICENSE"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "original/params.json"]
    unwanted += ["consolidated.safetensors"]
    chosen = filter_repo_objects(
        wanted + unwanted,
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(chosen) == wanted
