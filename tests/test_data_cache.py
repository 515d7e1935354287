"""Tokenised once: the cache of token windows, its kills and its damage."""

import errno
import pathlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from e3jax.config import Source
from e3jax.data import text
from e3jax.data.text import tokenize
from e3jax.data.windows import pack
from e3jax.errors import UserError
from words_tiny import documents, write


def test_cache_is_reused_and_follows_the_content(tmp_path, tokenizer_folder, data, monkeypatch):
    path = pathlib.Path(write(tmp_path / "t.jsonl", [{"text": "w1 w2"}]))
    source = [Source(path=str(path))]
    first = tokenize(source, data(), tokenizer_folder)

    def refuse(*_, **__):
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(text, "load_tokenizer", refuse)
        moved = shutil.copy(path, tmp_path / "elsewhere")
        shutil.move(moved, (tmp_path / "sub").mkdir() or tmp_path / "sub" / "t.jsonl")
        again = tokenize([Source(path=str(tmp_path / "sub" / "t.jsonl"))], data(), tokenizer_folder)
        assert again.fingerprint == first.fingerprint
        for changed in (data(window=17), data(pack=False), data(long_rows="drop")):
            with pytest.raises(AssertionError, match="tokenised again"):
                tokenize(source, changed, tokenizer_folder)
        write(path, [{"text": "w1 w3"}])
        with pytest.raises(AssertionError, match="tokenised again"):
            tokenize(source, data(), tokenizer_folder)
    assert tokenize(source, data(), tokenizer_folder).fingerprint != first.fingerprint


def test_a_kill_while_writing_leaves_no_finished_cache(
    tmp_path, tokenizer_folder, data, monkeypatch
):
    path = write(tmp_path / "t.jsonl", [{"text": "w1 w2"}] * 20)
    with monkeypatch.context() as patch:
        patch.setattr(text, "pack", lambda *a: _stopping(pack(*a)))
        with pytest.raises(KeyboardInterrupt):
            tokenize([Source(path=path)], data(), tokenizer_folder)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(documents(tokenize([Source(path=path)], data(), tokenizer_folder))) == 20


def _stopping(packed):
    yield next(packed)
    raise KeyboardInterrupt


def test_another_process_that_is_first_wins(tmp_path, tokenizer_folder, data, monkeypatch):
    """On a disk without locks, where both work."""

    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("e3jax.data.windows.fcntl", SimpleNamespace(flock=no_lock, LOCK_EX=2))
    path = write(tmp_path / "t.jsonl", [{"text": "w1 w2"}] * 5)
    inner = []

    def racing(*arguments):
        if not inner:
            inner.append(None)
            inner.append(tokenize([Source(path=path)], data(), tokenizer_folder))
        return pack(*arguments)

    monkeypatch.setattr(text, "pack", racing)
    outer = tokenize([Source(path=path)], data(), tokenizer_folder)
    assert outer.fingerprint == inner[1].fingerprint
    assert len([f for f in (tmp_path / "cache").iterdir()]) == 1


def test_one_tokenises_for_all_on_a_host(tmp_path, tokenizer_folder, data, monkeypatch):
    path = write(tmp_path / "t.jsonl", [{"text": "w1 w2"}] * 5)
    made = []

    def slow(*arguments):
        made.append(None)
        time.sleep(0.3)
        return pack(*arguments)

    monkeypatch.setattr(text, "pack", slow)
    with ThreadPoolExecutor(3) as pool:
        task = lambda _: tokenize([Source(path=path)], data(), tokenizer_folder)
        found = list(pool.map(task, range(3)))
    assert len(made) == 1 and len({windows.fingerprint for windows in found}) == 1
    assert len([f for f in (tmp_path / "cache").iterdir()]) == 1


def test_damaged_cache_is_named(tmp_path, tokenizer_folder, data):
    source = [Source(path=write(tmp_path / "t.jsonl", [{"text": "w1 w2"}]))]
    tokenize(source, data(), tokenizer_folder)
    [tokens] = (tmp_path / "cache").rglob("tokens.npy")
    tokens.write_bytes(tokens.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"damaged token windows.*remove this folder"):
        tokenize(source, data(), tokenizer_folder)
