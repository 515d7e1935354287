"""Small files are whole or not there; an identity changes exactly when what it names does."""

import dataclasses
import fcntl
import json
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest

from e3jax import config, files
from e3jax.errors import UserError


def test_json_goes_round(tmp_path):
    value = {"a": (1, 2), "path": pathlib.Path("x/y"), "array": np.arange(3), "n": np.float32(0.5)}
    files.write_json(tmp_path / "new" / "value.json", value)
    found = files.read_json(tmp_path / "new" / "value.json")
    assert found == {"a": [1, 2], "path": "x/y", "array": [0, 1, 2], "n": 0.5}
    assert found == files.plain_tree(value)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    files.write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON: object"):
        files.write_json(path, {"x": object()})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            files.write_json(path, 2)
    assert files.read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprint_is_of_the_content_not_of_the_order_or_the_type():
    spec = config.Search(steps=7)
    assert files.fingerprint(spec) == files.fingerprint(dataclasses.asdict(spec))
    assert files.fingerprint({"a": 1, "b": (2,)}) == files.fingerprint({"b": [2], "a": 1})
    assert files.fingerprint(spec) != files.fingerprint(config.Search(steps=8))
    assert len(files.fingerprint(None)) == 16


def test_differences_name_every_leaf():
    old = {"model": "x", "search": {"steps": 5, "lr": 0.1}, "gone": 1}
    new = {"model": "x", "search": {"steps": 6, "lr": 0.1}, "new": 2}
    found = files.differences(old, new)
    assert found == ["gone: 1 -> None", "new: None -> 2", "search.steps: 5 -> 6"]
    assert files.differences(old, json.loads(json.dumps(old))) == []


@pytest.fixture
def checkpoint(tmp_path):
    header = b"{}      "
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        data = struct.pack("<Q", len(header)) + header + bytes(4096)
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "a.safetensors", "b.safetensors"])
def test_checkpoint_hash_sees_every_file(checkpoint, name):
    before = files.checkpoint_hash(checkpoint)
    assert before == files.checkpoint_hash(checkpoint)
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert files.checkpoint_hash(checkpoint) != before


def test_checkpoint_hash_ignores_other_files(checkpoint):
    before = files.checkpoint_hash(checkpoint)
    (checkpoint / "README.md").write_text("about")
    assert files.checkpoint_hash(checkpoint) == before


def test_large_files_are_hashed_by_samples(checkpoint, monkeypatch):
    """Header, size and places all over the file count, without reading all of it."""
    monkeypatch.setattr(files, "SAMPLED_ABOVE", 2**20)
    monkeypatch.setattr(files, "SAMPLE", 2**10)
    path = checkpoint / "a.safetensors"
    path.write_bytes(bytes(2**22))
    seen = {files.checkpoint_hash(checkpoint)}
    for place in (8, 30 * (2**22 - 2**10) // 63, 2**22 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.add(files.checkpoint_hash(checkpoint))
    path.write_bytes(bytes(2**22 + 1))
    seen.add(files.checkpoint_hash(checkpoint))
    assert len(seen) == 5


def test_bundled_files_are_found_from_anywhere_and_give_way_to_local_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.bundled("demo/test.jsonl").is_file()
    assert files.bundled("elsewhere/demo") == pathlib.Path("elsewhere/demo")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "test.jsonl").write_text("{}\n")
    assert files.bundled("demo/test.jsonl").read_text() == "{}\n"


HOLD = """
import pathlib, sys
from e3jax import files

with files.locked(pathlib.Path(sys.argv[1]), "out=x"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path):
    """Another process that has the lock, until its stdin says so or it is killed."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.parametrize("killed", [True, False])
def test_a_lock_is_of_one_process_until_that_ends(tmp_path, killed):
    path = tmp_path / "new" / ".lock"
    process = hold(path)
    told = rf"^out=y: another run is at work there \(process {process.pid} of \S+, \w+\)"
    with pytest.raises(UserError, match=told), files.locked(path, "out=y"):
        pass
    if killed:
        process.kill()
    process.communicate()
    assert path.exists() == killed
    with files.locked(path, "out=y") as token:
        assert path.read_text().strip() == token
        assert token.startswith(f"process {os.getpid()} of ")
    assert not list(path.parent.iterdir())


def test_a_lock_that_was_removed_is_the_next_ones(tmp_path):
    """As the message says for a lost host's; the first one's end leaves the second's alone."""
    path = tmp_path / ".lock"
    with files.locked(path, "out=x"):
        path.unlink()
        process = hold(path)
    with pytest.raises(UserError, match=f"process {process.pid} of "), files.locked(path, "out=x"):
        pass
    process.communicate()


def test_a_lock_is_not_taken_of_a_file_that_its_holder_removes(tmp_path, monkeypatch):
    """Between our opening it and our locking it: a third would find none and make its own."""
    path, real = tmp_path / ".lock", fcntl.flock
    process = hold(path)

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", real)
        process.communicate()
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.locked(path, "out=x") as token:
        assert path.read_text() == token


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"^out=x: cannot be written: .*(exists|directory)"),
        files.locked(tmp_path / "file" / ".lock", "out=x"),
    ):
        pass
