"""The offline teacher's cache: round trip, restart, refusals, damage."""

import dataclasses
import shutil

import numpy as np
import pytest
import tensorstore

from e3jax.data import store
from e3jax.data.batches import gather, make_batches, used_windows
from e3jax.data.teacher import (
    BLOCK,
    ROWS_PER_SHARD,
    TeacherCache,
    deal,
    estimate_bytes,
    open_cache,
)
from e3jax.data.windows import Document, load_windows, pack, store_windows
from e3jax.errors import UserError

T, K = 16, 4


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    rng = np.random.default_rng(0)
    stream = (
        Document(rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.7)
        for n in rng.integers(3, T, 60)
    )
    folder = tmp_path_factory.mktemp("windows") / "stored"
    store_windows(pack(stream, T, limit=8), T, folder, {})
    return load_windows(folder)


@pytest.fixture(scope="module")
def teacher(windows):
    """Rows of a made-up teacher for every window, as `write` takes them."""
    rng = np.random.default_rng(1)
    m = len(windows)
    p = -np.sort(-rng.dirichlet(np.full(20, 0.3), (m, T)), axis=-1)[..., :K]
    return (
        rng.integers(0, 99, (m, T, K)).astype(np.int32),
        np.log(p + 1e-6).astype(np.float32),
        rng.random((m, T), np.float32) * 3,
        rng.normal(size=(m, T)).astype(np.float32) * 10,
    )


def create(path, windows, k=K, temperature=2.0, teacher_hash="t"):
    return TeacherCache.create(path, windows, k, temperature, teacher_hash)


def fill(cache, teacher, index):
    index = np.asarray(index)
    cache.write(index, *(x[index] for x in teacher))


@pytest.fixture
def finished(tmp_path, windows, teacher):
    """The folder of a finished cache."""
    cache = create(tmp_path / "cache", windows)
    fill(cache, teacher, np.arange(len(windows)))
    cache.finish(windows)
    return tmp_path / "cache"


def test_round_trip_in_any_order(tmp_path, windows, teacher):
    rng = np.random.default_rng(2)
    order = rng.permutation(len(windows))
    cache = create(tmp_path / "cache", windows)
    for start in range(0, len(order), 7):
        fill(cache, teacher, order[start : start + 7])
    stats = cache.finish(windows)

    cache = open_cache(tmp_path / "cache", windows, K, 2.0, "t")
    index = np.array([5, 0, -1, 5, len(windows) - 1])
    rows = cache.read(index)
    ids, logp, entropy, lognorm = teacher
    real = index >= 0
    assert {n: x.dtype for n, x in rows.items()} == {
        "ids": np.int32,
        "logp": np.float16,
        "entropy": np.float32,
        "lognorm": np.float32,
    }
    assert np.array_equal(rows["ids"][real], ids[index[real]])
    assert np.array_equal(rows["logp"][real], logp[index[real]].astype(np.float16))
    assert np.array_equal(rows["entropy"][real], entropy[index[real]])
    assert np.array_equal(rows["lognorm"][real], lognorm[index[real]])
    assert not any(x[~real].any() for x in rows.values())

    mask = gather(windows, np.arange(len(windows)))["mask"]
    assert cache.stats == stats and stats["loss_tokens"] == windows.meta["loss_tokens"]
    assert stats["mean_entropy"] == pytest.approx(entropy[mask].mean(), rel=1e-6)
    mass = np.exp(logp.astype(np.float16).astype(np.float64)).sum(-1)
    assert stats["captured_mass"] == pytest.approx(mass[mask].mean(), rel=1e-9)


def test_a_reader_may_ask_for_fewer_outcomes(finished, windows, teacher):
    rows = open_cache(finished, windows, 2, 2.0, "t").read(np.array([3]))
    assert np.array_equal(rows["ids"], teacher[0][[3], :, :2])
    assert rows["logp"].shape == (1, T, 2)


def test_size_is_68_bytes_a_token_at_10(tmp_path, windows, monkeypatch):
    assert estimate_bytes(500_000_000, 10) == 34_000_000_000
    need = estimate_bytes(windows.tokens.size, K)
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((need - 1, False), (need, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        if fits:
            create(tmp_path / "cache", windows)
        else:
            with pytest.raises(UserError, match=r"needs .* GB and the disk has .* GB free"):
                create(tmp_path / "cache", windows)
            assert not (tmp_path / "cache").exists()


def test_estimate_is_what_is_stored(finished, windows):
    cache = open_cache(finished, windows, K, 2.0, "t")
    stored = sum(
        cache.arrays[n].read().result().nbytes for n in ("ids", "logp", "entropy", "lognorm")
    )
    assert stored == estimate_bytes(windows.tokens.size, K)


class Killed:
    """An array whose write is where the process is killed."""

    def __init__(self, array):
        self.dtype = array.dtype

    def __getitem__(self, index):
        return self

    def write(self, _):
        raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["ids", "lognorm", "check"])
def test_a_kill_while_writing_leaves_the_rows_to_do(tmp_path, windows, teacher, at):
    """Rows count as done only after all their data is durable; the next run goes on there."""
    m, path = len(windows), tmp_path / "cache"
    cache = create(path, windows)
    assert cache.todo().tolist() == list(range(m))
    fill(cache, teacher, range(6))
    arrays = cache.arrays | {at: Killed(cache.arrays[at])}
    with pytest.raises(KeyboardInterrupt):
        fill(dataclasses.replace(cache, arrays=arrays), teacher, range(6, 12))

    cache = create(path, windows)
    assert cache.todo().tolist() == list(range(6, m))
    with pytest.raises(UserError, match="not finished"):
        open_cache(path, windows, K, 2.0, "t")
    with pytest.raises(UserError, match=r"row 6 of the teacher cache.*never written"):
        cache.finish(windows)
    fill(cache, teacher, cache.todo())
    cache.finish(windows)
    assert len(create(path, windows).todo()) == 0
    rows = open_cache(path, windows, K, 2.0, "t").read(np.arange(m))
    assert np.array_equal(rows["ids"], teacher[0])


def test_empty_rows_of_a_batch_are_not_written(tmp_path, windows, teacher):
    cache = create(tmp_path / "cache", windows)
    index = np.array([2, -1, 3])
    cache.write(index, *(x[np.maximum(index, 0)] for x in teacher))
    assert sorted(set(range(len(windows))) - set(cache.todo().tolist())) == [2, 3]
    cache.write(np.array([-1, -1]), *(x[:2] for x in teacher))  # a process with no turn
    assert len(cache.todo()) == len(windows) - 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": K + 1}, r"holds the 4 most probable tokens.*top_k=5"),
        ({"temperature": 1.0}, r"for temperature 2.0, and this run asks for 1.0"),
        ({"teacher_hash": "u"}, r"for teacher 't', and this run asks for 'u'"),
    ],
)
def test_a_reader_that_asks_for_something_else_is_refused(finished, windows, change, message):
    asked = {"k": K, "temperature": 2.0, "teacher_hash": "t"} | change
    with pytest.raises(UserError, match=message):
        open_cache(finished, windows, **asked)
    with pytest.raises(UserError, match="holds a teacher cache with"):
        create(finished, windows, **asked)


def test_other_windows_are_refused(finished, windows, tmp_path):
    other = dataclasses.replace(windows, fingerprint="other")
    with pytest.raises(UserError, match="for windows"):
        open_cache(finished, other, K, 2.0, "t")
    with pytest.raises(UserError, match="no teacher cache here"):
        open_cache(tmp_path / "absent", windows, K, 2.0, "t")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        create(tmp_path / "taken", windows)


def test_a_row_changed_on_disk_is_named(finished, windows):
    cache = open_cache(finished, windows, K, 2.0, "t")
    one = cache.arrays["entropy"][9, 3]
    one.write(one.read().result() + 1).result()
    cache.read(np.array([8, 10]))
    with pytest.raises(UserError, match=r"row 9 of the teacher cache.*checksum"):
        cache.read(np.array([8, 9]))


def test_a_truncated_file_is_named(finished, windows):
    shard = max((finished / "ids").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    cache = open_cache(finished, windows, K, 2.0, "t")
    with pytest.raises(UserError, match=r"row \d+ of the teacher cache cannot be used"):
        cache.read(np.arange(len(windows)))


def test_a_teacher_that_is_not_finite_is_refused(tmp_path, windows, teacher):
    cache = create(tmp_path / "cache", windows)
    entropy = teacher[2][:3].copy()
    entropy[1, 5] = np.nan
    with pytest.raises(UserError, match="entropy is not finite in window 11"):
        cache.write(np.array([10, 11, 12]), teacher[0][:3], teacher[1][:3], entropy, teacher[3][:3])
    assert len(cache.todo()) == len(windows)


def test_layout_is_zarr3_with_one_row_a_chunk(finished, windows):
    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(finished / "ids")}}
    ).result()
    assert array.chunk_layout.read_chunk.shape == (1, T, K)
    assert array.dtype == tensorstore.int32 and array.shape == (len(windows), T, K)


# ---------------------------------------------------------------- only what is used


@pytest.mark.parametrize(("steps", "count"), [(1, 100), (7, 100), (13, 100), (40, 100), (3, 5)])
def test_used_windows_are_those_of_the_batches(windows, steps, count):
    few = dataclasses.replace(windows, tokens=np.zeros((count, T), np.int32))
    few = dataclasses.replace(few, segments=few.tokens, loss=few.tokens > 0)
    batches = make_batches(few, 8, seed=3)
    seen = np.unique(np.concatenate([batches(step)["index"] for step in range(steps)]))
    assert np.array_equal(used_windows(count, 8, 3, steps), seen)


def test_a_cache_of_some_windows_is_extended(tmp_path, windows, teacher):
    """A later run that needs more windows writes those alone; each has figures of its own."""
    few, more = np.array([1, 4, 9]), np.array([1, 2, 9, 11])
    facts = (tmp_path / "cache", windows, K, 2.0, "t")
    cache = TeacherCache.create(*facts, few)
    assert cache.todo().tolist() == few.tolist()
    fill(cache, teacher, few)
    first = cache.finish(windows)
    rows = open_cache(*facts, few).read(few)
    assert np.array_equal(rows["ids"], teacher[0][few])
    with pytest.raises(UserError, match=r"row 2 .*never written"):
        open_cache(*facts, few).read(np.array([2]))
    for other in (more, None):
        with pytest.raises(UserError, match="not finished with this run's windows"):
            open_cache(*facts, other)

    cache = TeacherCache.create(*facts, more)
    assert cache.todo().tolist() == [2, 11]
    fill(cache, teacher, [2, 11])
    second = cache.finish(windows)
    mask = gather(windows, more)["mask"]
    assert second["mean_entropy"] == pytest.approx(teacher[2][more][mask].mean(), rel=1e-6)
    assert second != first and open_cache(*facts, more).stats == second


# ---------------------------------------------------------------- several writers


@pytest.mark.parametrize(
    "owners", [[0] * 4, [0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 2, 2], [3, 1, 1, 0, 0, 0]]
)
@pytest.mark.parametrize("left", [1.0, 0.3])
def test_every_file_has_one_writer(owners, left):
    """Each window is dealt once; no two processes get windows of one shard file of any array."""
    todo = np.flatnonzero(np.random.default_rng(0).random(1000) < left)
    dealt = deal(todo, np.array(owners))
    assert sorted(dealt[dealt >= 0].tolist()) == todo.tolist()
    writers = {}
    for column, owner in enumerate(owners):
        for window in dealt[:, column][dealt[:, column] >= 0]:
            writers.setdefault(window // ROWS_PER_SHARD, set()).add(owner)
            writers.setdefault(("check", window // BLOCK), set()).add(owner)
    assert all(len(who) == 1 for who in writers.values())
    assert set.union(*writers.values()) == set(owners)
    most = max(np.count_nonzero(dealt[:, column] >= 0) for column in range(len(owners)))
    assert len(dealt) == most  # no batch is empty


def test_bytes_a_token_as_stored(finished, windows):
    cache = open_cache(finished, windows, K, 2.0, "t")
    data = [
        f for n in ("ids", "logp", "entropy", "lognorm") for f in (finished / n / "c").rglob("*")
    ]
    stored = sum(f.stat().st_size for f in data if f.is_file())
    assert cache.bytes_a_token() == pytest.approx(stored / windows.tokens.size)


# ---------------------------------------------------------------- buckets


def test_addresses():
    assert store.kvstore("/data/cache") == {"driver": "file", "path": "/data/cache/"}
    assert store.kvstore("gs://teachers/qwen3/32b/") == {
        "driver": "gcs",
        "bucket": "teachers",
        "path": "qwen3/32b/",
    }
    assert store.kvstore("gs://teachers")["path"] == ""
    for bad in ("s3://b/c", "gs://", "gs:///c", "http://x/y"):
        with pytest.raises(UserError, match="expected a folder, or gs://bucket/path"):
            store.kvstore(bad)


def test_tensorstore_takes_the_bucket_for_files_and_arrays():
    place = store.Store("gs://teachers/qwen3")
    assert tensorstore.KvStore.Spec(place.spec).url == "gs://teachers/qwen3/"
    assert place.free_bytes() is None
    spec = {"driver": "zarr3", "kvstore": place.spec | {"path": f"{place.spec['path']}ids/"}}
    assert tensorstore.Spec(spec).kvstore.url == "gs://teachers/qwen3/ids/"


def test_a_bucket_that_cannot_be_reached_is_told(windows, monkeypatch):
    """A port where nobody listens stands for a machine without network."""
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://localhost:1")
    monkeypatch.setitem(store.CONTEXT, "gcs_request_retries", {"max_retries": 1})
    with pytest.raises(UserError, match=r"gs://teachers/q: cannot be read: .*check the bucket's"):
        open_cache("gs://teachers/q", windows, K, 2.0, "t")
