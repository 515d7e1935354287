"""How weights are read: each byte once, only those of the devices, into memory used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from e3jax import mesh
from e3jax.hf import blocks, load, reading
from e3jax.hf.folders import stored_tensors
from e3jax.hf.load import load_params
from e3jax.hf.safetensors import read_header
from hf_tiny import save_tiny


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


@pytest.mark.parametrize(("device", "page"), [(0, 1), (5, 1), (5, reading.PAGE)])
def test_a_process_reads_only_the_bytes_of_its_devices(tmp_path, monkeypatch, reads, device, page):
    """As if this process had one device of eight: what is read of each tensor is its shard, and
    with real pages what lies between its bytes, all in one."""
    monkeypatch.setattr(reading, "PAGE", page)
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
    needed = sum(part.nbytes for _, part in shards)
    if page == 1:
        assert sum(nbytes for *_, nbytes in reads) == needed
    else:
        assert needed < sum(nbytes for *_, nbytes in reads) <= sum(sizes(folder).values())
        assert len(reads) <= len(sizes(folder))
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


@pytest.mark.parametrize(
    ("shape", "box", "read"),
    [
        ((1000, 5120), ((0, 1000), (160, 320)), ((0, 1000), (0, 5120))),  # 320 bytes a row
        ((1000, 5120), ((0, 1000), (0, 2048)), ((0, 1000), (0, 2048))),  # a page
        ((1000, 5120), ((7, 9), (0, 5120)), ((7, 9), (0, 5120))),
        (
            (64, 8, 128, 80),
            ((0, 9), (2, 4), (0, 128), (8, 16)),
            ((0, 9), (2, 4), (0, 128), (0, 80)),
        ),
        ((64, 8, 1, 80), ((0, 9), (2, 4), (0, 1), (8, 16)), ((0, 9), (0, 8), (0, 1), (0, 80))),
        ((5120,), ((0, 160),), ((0, 160),)),
    ],
)
def test_runs_shorter_than_a_page_are_read_with_their_gaps(shape, box, read):
    assert reading._with_gaps(box, shape, 2) == read


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
