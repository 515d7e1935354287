"""The mesh: sizes, rules, placement; and nothing of it needed where none is set."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from e3jax import mesh
from e3jax.errors import UserError
from training_tiny import set_mesh


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4))],
)
def test_sizes(sizes, expected):
    made = mesh.make_mesh(*sizes)
    assert tuple(made.shape.items()) == tuple(zip(mesh.AXES, expected))
    assert set(made.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize("sizes", [(1, 3, 1), (3, -1, 1), (1, -1, 16), (1, 4, 1)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match="devices and there are 8; change the mesh sizes"):
        mesh.make_mesh(*sizes)


class Slices:
    """Eight devices of two slices, four each: GPU hosts, each with an NVLink of its own."""

    platform, device_kind = "gpu", "H100"

    def __init__(self, number):
        self.id, self.process_index, self.slice_index = number, number // 4, number // 4


@pytest.mark.parametrize(
    ("sizes", "across"),  # the axis along which the slice changes
    [((2, -1, 1), 0), ((2, 2, 2), 0), ((4, -1, 1), 0), ((1, -1, 1), 1), ((1, 2, 4), 1)],
)
def test_slices_are_crossed_by_the_outermost_axis(sizes, across):
    grid = mesh.make_mesh(*sizes, devices=[Slices(i) for i in range(8)]).devices
    slice_of = np.vectorize(lambda device: device.slice_index)(grid)
    for axis in range(3):
        crossed = np.count_nonzero(np.diff(slice_of, axis=axis))
        # Each line along that axis changes slice once, and no other axis ever does.
        assert crossed == (slice_of.size // slice_of.shape[axis] if axis == across else 0)


def test_slices_that_no_axis_can_cross():
    with pytest.raises(UserError, match=r"over 2 slices of devices; make mesh\.replica a multiple"):
        mesh.make_mesh(1, 1, 8, devices=[Slices(i) for i in range(8)])


class Torus:
    """A chip of a v5p:4x4x2, at its place."""

    platform, device_kind, slice_index, core_on_chip = "tpu", "TPU v5", 0, 0

    def __init__(self, *coords):
        self.coords, self.process_index = coords, 0
        self.id = coords[0] + 4 * (coords[1] + 4 * coords[2])


@pytest.mark.parametrize("replica", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("model", [1, 2, 4, 8, 16])
def test_every_division_of_a_torus(replica, model):
    """Also where an axis is only a part of one of the torus's."""
    chips = [Torus(x, y, z) for z, y, x in np.ndindex(2, 4, 4)]
    if 32 % (replica * model):
        with pytest.raises(UserError, match="there are 32"):
            mesh.make_mesh(replica, -1, model, devices=chips)
        return
    grid = mesh.make_mesh(replica, -1, model, devices=chips).devices
    assert grid.shape == (replica, 32 // replica // model, model)
    assert {chip.id for chip in grid.flat} == set(range(32))


def test_rules():
    assert mesh.spec(("embed", "heads", None)) == P("data", "model", None)
    assert mesh.spec(("batch", None)) == P(("replica", "data"), None)
    with set_mesh(2, 2, 2):
        assert mesh.axis_size(mesh.current(), mesh.BATCH) == 4
        assert mesh.axis_size(mesh.current(), "model") == 2
        assert mesh.axis_size(mesh.current(), None) == 1
        assert mesh.spec(("embed", "heads"), (6, 3)) == P("data", None)  # 3 over 2: replicated
        assert mesh.spec(("batch", "vocab"), (8, 10)) == P(("replica", "data"), "model")
        assert mesh.spec(("batch",), (2,)) == P(None)  # 2 rows over 4


def test_rows_are_spread_and_everything_else_whole():
    rows = np.arange(24.0).reshape(8, 3)
    with set_mesh(2, 2, 2):
        placed, whole = mesh.shard_batch({"x": rows})["x"], mesh.replicate({"x": rows})["x"]
    np.testing.assert_array_equal(placed, rows)
    assert [s.data.shape for s in placed.addressable_shards] == [(2, 3)] * 8
    assert [s.data.shape for s in whole.addressable_shards] == [(8, 3)] * 8


def test_no_mesh_no_shardings():
    assert mesh.current() is None
    assert mesh.sharding(("embed", None), (4, 4)) is None
    assert mesh.out(("batch", None), (4, 4)) is None
    rows = mesh.shard_batch(np.ones((3, 2), np.float32))
    assert rows.devices() == mesh.replicate(rows).devices() == {jax.devices()[0]}


def test_abstract_mesh_gives_types_without_devices():
    pod = mesh.abstract_mesh(4, 64, 8)
    with jax.sharding.use_abstract_mesh(pod):
        place = mesh.sharding(("embed", "heads"), (128, 4))
    assert place.mesh == pod and place.spec == P("data", None)


class Place(NamedTuple):
    process_index: int
    number: int


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (2, (1, 8, 1)),
        (4, (1, 8, 1)),
        (2, (2, 4, 1)),
        (4, (2, 2, 2)),
        (2, (1, 2, 4)),
        (8, (1, 2, 4)),
    ],
)
def test_the_rows_of_processes_make_up_the_batch(monkeypatch, count, sizes):
    """Eight devices dealt out to processes that are not started: what each of them would read.

    With a model axis across processes several hold the same rows; the lowest of them owns these.
    """
    devices = jax.devices()
    each = len(devices) // count
    with set_mesh(*sizes):
        place = mesh.sharding(("batch",))
        whole = place.devices_indices_map((16,))
        held = []
        for number in range(count):
            mine = devices[number * each : (number + 1) * each]
            local = {device: part for device, part in whole.items() if device in mine}
            monkeypatch.setattr(
                type(place), "addressable_devices_indices_map", lambda *_, local=local: local
            )
            held.append(mesh.rows_here(16))
            monkeypatch.undo()
        # The same devices, said to be of that many processes.
        dealt = [(Place(d.id // each, d.id), part) for d, part in whole.items()]
        fake = SimpleNamespace(devices_indices_map=lambda _: dict(dealt))
        monkeypatch.setattr(mesh, "sharding", lambda _: fake)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        owners = mesh.row_owners(16)
    assert np.array_equal(np.unique(np.concatenate(held)), np.arange(16))
    if sizes[2] == 1:
        assert np.array_equal(np.concatenate(held), np.arange(16))
    for row, owner in enumerate(owners):
        assert owner == min(number for number in range(count) if row in held[number])


def test_a_batch_that_the_devices_cannot_share():
    """It is not filled up: what a step learns must not depend on the number of devices."""
    with set_mesh(1, 8, 1), pytest.raises(UserError) as error:
        mesh.check_shared("search.batch", 12)
    assert "search.batch=12" in str(error.value)
    assert "a multiple of 8, or mesh.model=2" in str(error.value)
    for sizes in [(1, 4, 2), (2, 2, 2), (1, 1, 1)]:
        with set_mesh(*sizes):
            mesh.check_shared("search.batch", 12)
    mesh.check_shared("search.batch", 13)  # no mesh
