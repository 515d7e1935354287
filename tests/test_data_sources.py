"""Where rows come from: files, folders, slices, data sets of the hub; bad rows are named."""

import gzip
import json
import shutil

import pytest

from e3jax.config import Source
from e3jax.data import sources
from e3jax.data.text import check_vocab, load_tokenizer, tokenize
from e3jax.errors import UserError
from words_tiny import VOCAB, WORDS, documents, words_of, write


def test_text_file_is_one_document_and_folders_are_read(tmp_path, tokenizer_folder, data):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("w1\nw2\n\nw3")
    (folder / "b.txt").write_text("w4")
    one = tokenize([Source(path=str(folder / "a.txt"))], data(), tokenizer_folder)
    assert [words_of(ids) for ids, _ in documents(one)] == ["<bos> w1 w2 w3 <eos>"]
    both = tokenize([Source(path=str(folder))], data(), tokenizer_folder)
    assert [words_of(ids) for ids, _ in documents(both)] == [
        "<bos> w1 w2 w3 <eos>",
        "<bos> w4 <eos>",
    ]


def test_parquet_json_and_csv_hold_the_same_rows(tmp_path, tokenizer_folder, data):
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.table({"text": ["w1 w2", "w3"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "t.csv")
    (tmp_path / "t.json").write_text(json.dumps(table.to_pylist()))
    found = {
        tokenize([Source(path=str(tmp_path / f"t.{s}"))], data(), tokenizer_folder).fingerprint
        for s in ("parquet", "csv", "json")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "rows, expected",
    [
        ((), range(10)),
        (("0:2", "7:9"), [0, 1, 7, 8]),
        (("-3:",), [7, 8, 9]),
        (("8:", ":1"), [8, 9, 0]),
    ],
)
def test_row_slices(tmp_path, rows, expected):
    path = write(tmp_path / "t.jsonl", [{"text": WORDS[i]} for i in range(10)])
    got = [(n, row["text"]) for n, row in sources.open_rows(Source(path=path, rows=rows))]
    assert got == [(i, WORDS[i]) for i in expected]


def test_reading_local_files_leaves_the_hugging_face_cache_alone(
    tmp_path, tokenizer_folder, data, monkeypatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = write(tmp_path / "t.jsonl.gz", [{"text": "w1"}])
    tokenize([Source(path=path)], data(), tokenizer_folder)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([{"body": "w1"}], {}, "none of the fields.*it has body"),
        ([{"body": "w1"}], {"format": "text"}, "row 0: no field 'text'; it has body"),
        ([{"text": "w1"}, {"text": 5}], {}, "row 1: field 'text' is int, expected text"),
        ([{"text": "w1"}, {"text": None}], {}, "row 1: no field 'text'"),
        ([{"prompt": "w1", "completion": ["w2"]}], {}, "row 0: field 'completion' is list"),
        (
            [{"messages": [{"from": "human", "value": "w1"}]}],
            {},
            "row 0: field 'messages' is not a",
        ),
        ([{"messages": "w1"}], {}, "row 0: field 'messages' is not a list"),
        ([{"messages": [{"role": "user", "content": "w1"}]}], {}, "has none; use prompt and"),
        ([], {}, "the data set is empty"),
        ([{"text": "w1"}], {"rows": ("5:9",)}, "rows 5:9 select nothing"),
        ([{"text": " "}, {"text": ""}], {}, "no document is left: 2 empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer_folder, data, rows, options, message):
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match=message):
        tokenize([Source(path=path, **options)], data(), tokenizer_folder)
    assert not any((tmp_path / "cache").glob("*")), "something half-written"


def test_malformed_line_is_named(tmp_path, tokenizer_folder, data, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    good = json.dumps({"text": "w1"})
    for name, content in {
        "t.jsonl": f"{good}\n{good}\n{{'text'\n{good}\n".encode(),
        "t.jsonl.gz": gzip.compress(f"{good}\n\n[1]\n".encode()),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}.*line 3 \(row 2\) is not"):
            tokenize([Source(path=str(tmp_path / name))], data(), tokenizer_folder)
    whole = gzip.compress((good + "\n").encode() * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        tokenize([Source(path=str(tmp_path / "cut.jsonl.gz"))], data(), tokenizer_folder)


def test_other_bad_sources(tmp_path, tokenizer_folder, data):
    (tmp_path / "t.pkl").write_bytes(b"x")
    (tmp_path / "none").mkdir()
    text_rows = write(tmp_path / "t.jsonl", [{"text": " ".join(WORDS)}])
    for path, message in {
        str(tmp_path / "absent.jsonl"): "absent.jsonl: no such file",
        "absent.parquet": "absent.parquet: no such file",
        str(tmp_path / "t.pkl"): "unknown format '.pkl'",
        str(tmp_path / "none"): "the folder holds none of",
    }.items():
        with pytest.raises(UserError, match=message):
            tokenize([Source(path=path)], data(), tokenizer_folder)
    with pytest.raises(UserError, match="no data"):
        tokenize([], data(), tokenizer_folder)
    with pytest.raises(UserError, match="plain text has none"):
        tokenize([Source(path=text_rows)], data(loss_on="completion"), tokenizer_folder)
    with pytest.raises(UserError, match="no document is left: 0 empty, 1 dropped"):
        tokenize([Source(path=text_rows)], data(long_rows="drop"), tokenizer_folder)


def test_hub_id_without_network(no_network, tokenizer_folder, data):
    with pytest.raises(UserError, match=r"no such file or folder here.*cannot be reached"):
        tokenize([Source(path="some-one/set")], data(), tokenizer_folder)


@pytest.mark.parametrize("online", [True, False])
def test_hub_set_is_pinned_and_falls_back_to_its_cache(
    tmp_path, tokenizer_folder, data, monkeypatch, no_network, online
):
    """With a network, the revision in the fingerprint is the one read; without, the copy is."""
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": w} for w in WORDS[:5]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if online:
        info = huggingface_hub.hf_api.DatasetInfo(id="some-one/set", sha="abc", tags=[])
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    else:
        (tmp_path / "hf" / "some-one___set").mkdir(parents=True)
    source = Source(path="some-one/set", name="main", split="test", rows=("-2:", "4:99"))
    windows = tokenize([source], data(), tokenizer_folder)
    assert [words_of(ids) for ids, _ in documents(windows)] == [
        f"<bos> w{i} <eos>" for i in (3, 4, 4)
    ]
    [(arguments, options)] = asked
    assert arguments == ("some-one/set", "main") and options["split"] == "test"
    assert options["revision"] == ("abc" if online else None)


def test_tokenizer_errors(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tokenizer_folder)
    check_vocab(tokenizer, len(VOCAB))
    with pytest.raises(UserError, match=rf"'w39' has id {len(VOCAB) - 1}.*vocab_size is 40"):
        check_vocab(tokenizer, 40)


def test_a_token_that_only_the_configuration_adds(tmp_path, tokenizer_folder):
    """tokenizer.json need not name it: its id counts all the same."""
    shutil.copytree(tokenizer_folder, tmp_path / "more")
    path = tmp_path / "more" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    added = {"content": "<new>", "special": True}
    settings["added_tokens_decoder"] = {str(len(VOCAB)): added}
    settings["pad_token"] = "<new>"
    path.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "more")
    check_vocab(tokenizer, len(VOCAB) + 1)
    with pytest.raises(UserError, match=rf"'<new>' has id {len(VOCAB)}"):
        check_vocab(tokenizer, len(VOCAB))
