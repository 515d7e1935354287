"""Checkpoints in: logits equal transformers', and everything unsound is refused by name."""

import json
import struct

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from e3jax import mesh
from e3jax.errors import UserError
from e3jax.hf import blocks, load, reading
from e3jax.hf.families import read_config
from e3jax.hf.folders import INDEX, check_vocabulary, source_dtype, stored_tensors
from e3jax.hf.hub import resolve
from e3jax.hf.load import load_params
from e3jax.hf.safetensors import read_header
from hf_tiny import (
    SHARED,
    assert_same_logits,
    edit_json,
    our_logits,
    random_tokens,
    save_tiny,
    torch_logits,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 64}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False},
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16, "num_key_value_heads": 1}),
    "llama-ungrouped": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": (
        "qwen3",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}


@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_logits_equal_transformers(tmp_path, family, changes):
    folder = save_tiny(tmp_path, family, **changes)
    tokens = random_tokens(96, 40)  # five windows long
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_logits_past_the_original_context(tmp_path, rope, family):
    longest = 64 if rope["rope_type"] == "dynamic" else 256
    sizes = {"max_position_embeddings": longest, "head_dim": 32, "num_hidden_layers": 2}
    folder = save_tiny(tmp_path, family, rope_parameters=dict(rope), **sizes)
    tokens = random_tokens(96, 160, rows=1)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_dtypes_in_shards(tmp_path, dtype):
    folder = save_tiny(tmp_path, "qwen2", getattr(torch, dtype), shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert source_dtype(folder) == dtype
    params = load_params(folder)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    tokens = random_tokens(96, 12)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


def test_transformers_4_form(tmp_path):
    folder = save_tiny(tmp_path, "llama", head_dim=32, max_position_embeddings=256)

    def old(config):
        del config["rope_parameters"], config["dtype"]
        config |= {"rope_theta": 5e5, "torch_dtype": "float32"}
        config["rope_scaling"] = {"type": "linear", "factor": 4.0}

    tokens = random_tokens(96, 40)
    before = our_logits(folder, tokens)
    edit_json(folder / "config.json", old)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))
    assert np.abs(our_logits(folder, tokens) - before).max() > 1e-2


@pytest.mark.parametrize("name", ["chain-math-24l", "stories260k"])
def test_real_checkpoints(name):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip("no ../shared/models")
    tokens = random_tokens(read_config(folder).vocab_size, 64)
    assert_same_logits(our_logits(folder, tokens), torch_logits(folder, tokens))


def test_sharded_load_is_the_same_arrays(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", torch.bfloat16, shard="20KB", attention_bias=True)
    plain = load_params(folder)
    model = 2 if jax.device_count() % 2 == 0 else 1
    with jax.set_mesh(mesh.make_mesh(model=model)):
        spread = load_params(folder)
        assert spread["layers"]["q"].sharding.spec == mesh.spec(
            (None, "heads", "groups", None, "embed")
        )
        assert jax.device_count() == 1 or not spread["layers"]["q"].is_fully_replicated
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# ---- tied, stored either way


def rewrite(folder, change, metadata=None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})


@pytest.mark.parametrize("how", ["embed", "head", "both", "alias", "alias of head"])
def test_tied_however_it_is_stored(tmp_path, how):
    folder = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    expected = load_params(folder)
    assert "head" not in expected

    def change(tensors):
        if how in ("head", "both", "alias of head"):
            tensors[HEAD] = tensors[EMBED].clone()
        if how in ("head", "alias of head"):
            del tensors[EMBED]

    alias = {"alias": {HEAD: EMBED}, "alias of head": {EMBED: HEAD}}.get(how)
    rewrite(folder, change, alias)
    jax.tree.map(np.testing.assert_array_equal, load_params(folder), expected)


def test_untied_config_with_an_alias_gets_both(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    rewrite(folder, lambda t: t.pop(HEAD), {HEAD: EMBED})
    params = load_params(folder)
    np.testing.assert_array_equal(params["head"], params["embed"])


def test_tied_but_different_is_refused(tmp_path):
    folder = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({HEAD: t[EMBED] + 1}))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_params(folder)


# ---- unsound checkpoints


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


def test_tokenizer_of_another_model(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    cfg = read_config(folder)
    check_vocabulary(folder, cfg)  # no tokenizer.json: nothing to say
    file = {"model": {"vocab": {"a": 0, "b": 94}}, "added_tokens": [{"id": 95, "content": "<x>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    check_vocabulary(folder, cfg)
    file["added_tokens"][0]["id"] = 96
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match=r"token id 96.*vocabulary is 96"):
        check_vocabulary(folder, cfg)


# ---- how it reads


@pytest.fixture
def reads(monkeypatch):
    """Every box of weights that is read: (name, box, bytes)."""
    found, real = [], reading.read

    def read(stored, shape, box, to):
        real(stored, shape, box, to)
        found.append((stored.name, box, to.nbytes))

    monkeypatch.setattr(reading, "read", read)
    return found


def sizes(folder) -> dict[str, int]:
    return {name: stored.nbytes for name, stored in stored_tensors(folder).items()}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2), (2, 4), (1, 1)])
def test_each_byte_is_read_once(tmp_path, monkeypatch, reads, data, model, small):
    """On any mesh, in pieces of any size; the arrays are right on all devices."""
    folder = save_tiny(tmp_path, "qwen2", torch.bfloat16, shard="20KB")
    plain = load_params(folder)
    reads.clear()
    if small:
        monkeypatch.setattr(blocks, "BYTES", 300)
    devices = jax.devices()[: data * model]
    with jax.set_mesh(mesh.make_mesh(data=data, model=model, devices=devices)):
        spread = load_params(folder)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        for shard in y.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(x[shard.index]))
    read = dict.fromkeys(sizes(folder), 0)
    for name, _, nbytes in reads:
        read[name] += nbytes
    assert read == sizes(folder)
    assert len(reads) > len(read) if small else len(reads) == len(read)


@pytest.mark.parametrize("device", [0, 5])
def test_a_process_reads_only_the_bytes_of_its_devices(tmp_path, monkeypatch, reads, device):
    """As if this process had one device of eight: what is read of each tensor is its shard."""
    folder = save_tiny(tmp_path, "qwen2", torch.bfloat16)
    whole = load_params(folder)
    reads.clear()
    mine, real = jax.devices()[device], load._boxes
    monkeypatch.setattr(load, "_boxes", lambda leaf: {mine: real(leaf)[mine]})
    shards = []

    def keep_parts(leaf, parts):
        shards.append((leaf, parts[real(leaf)[mine]]))
        return jnp.zeros(leaf.shape, leaf.dtype)

    monkeypatch.setattr(load, "_array", keep_parts)
    with jax.set_mesh(mesh.make_mesh(data=4, model=2)):
        load_params(folder)
        places = [leaf.sharding.addressable_devices_indices_map(leaf.shape) for leaf, _ in shards]
    expected = sorted((leaf.shape, np.asarray(part, np.float32).tobytes()) for leaf, part in shards)
    flat = {}
    for x in jax.tree.leaves(whole):
        flat.setdefault(x.shape, []).append(np.asarray(x, np.float32))
    found = []
    for (leaf, _), place in zip(shards, places, strict=True):
        found.append((leaf.shape, flat[leaf.shape].pop(0)[place[mine]].tobytes()))
    assert sorted(found) == expected
    assert sum(nbytes for *_, nbytes in reads) == sum(part.nbytes for _, part in shards)
    assert sum(part.nbytes for _, part in shards) < sum(sizes(folder).values()) / 3


@pytest.mark.parametrize("spread", [False, True])
def test_where_the_devices_have_memory_of_their_own(tmp_path, monkeypatch, spread):
    """As on a GPU or TPU: the host holds a few tensors of one layer, never a stack."""
    folder = save_tiny(tmp_path, "qwen3", torch.bfloat16, num_hidden_layers=6)
    expected = load_params(folder)
    monkeypatch.setattr(load, "_fills_host_memory", lambda: False)
    monkeypatch.setattr(load, "AHEAD", 2**14)  # bytes; a layer has more
    asked, real, put = [], load._empty, jax.device_put
    monkeypatch.setattr(load, "_empty", lambda leaf: asked.append(leaf.shape) or real(leaf))
    monkeypatch.setattr(jax, "device_put", lambda x, device: put(np.array(x), device))
    devices = jax.devices() if spread else jax.devices()[:1]
    with jax.set_mesh(mesh.make_mesh(model=2 if spread else 1, devices=devices)):
        params = load_params(folder)
        assert params["layers"]["q"].sharding.spec == mesh.spec(
            (None, "heads", "groups", None, "embed")
        )
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    stacked = {x.shape for x in jax.tree.leaves(expected["layers"])}
    assert not stacked & set(asked)
    assert len(asked) < len(stored_tensors(folder)) / 2  # memory is used again


def test_merged_boxes():
    row = [((0, 4), (i, i + 2)) for i in (0, 2, 4)]
    assert reading.merged([*row, row[0]]) == [((0, 4), (0, 6))]
    assert reading.merged([row[0], row[2]]) == [row[0], row[2]]  # a gap stays unread
    square = [((i, i + 2), (j, j + 2)) for i in (0, 2) for j in (0, 2)]
    assert reading.merged(square) == [((0, 4), (0, 4))]
    assert reading.merged([()]) == [()]
    assert len(reading.merged(square[:3])) == 2


@pytest.mark.parametrize("cut", [(0, 5, 0, 4, 0, 6), (1, 3, 0, 4, 0, 6), (1, 4, 2, 3, 0, 6)])
@pytest.mark.parametrize("inner", [(0, 6), (2, 5)])
def test_a_box_of_a_file(tmp_path, cut, inner):
    array = np.arange(120, dtype=np.float32).reshape(5, 4, 6)
    save_file({"x": torch.from_numpy(array)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")[0]["x"]
    box = (cut[:2], cut[2:4], inner)
    found = np.empty([end - begin for begin, end in box], np.float32)
    reading.read(stored, (5, 4, 6), box, found)
    np.testing.assert_array_equal(found, array[tuple(slice(*b) for b in box)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_finiteness(dtype):
    x = np.random.default_rng(0).normal(size=(37, 5, 41)).astype(dtype)
    assert blocks.finite(x) and blocks.finite(np.array([jnp.finfo(dtype).max], dtype))
    for bad in (np.nan, np.inf, -np.inf):
        x[3, 2, 1] = bad
        assert not blocks.finite(x)
