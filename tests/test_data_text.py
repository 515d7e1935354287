"""Sources, rendering, packing and storage of token windows; decontamination; problems."""

import errno
import gzip
import json
import pathlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from e3jax.config import Data, Source
from e3jax.data import decontaminate, sources, text
from e3jax.data.text import check_vocab, load_tokenizer, problems, tokenize
from e3jax.data.windows import Document, cut, pack
from e3jax.errors import UserError

WORDS = [f"w{i}" for i in range(40)]
VOCAB = ["<pad>", "<bos>", "<eos>", "<unk>", "user:", "assistant:", "system:", *WORDS]
BOS, EOS = 1, 2
SHARED = pathlib.Path(__file__).parents[2] / "shared"
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT_MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} <eos>{% endgeneration %}{% else %}{{ m.content }} <eos>{% endif %}\n"
    "{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A word-level tokenizer that puts <bos> in front and knows <eos>; no chat template."""
    folder = tmp_path_factory.mktemp("words")
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def chat_folder(tokenizer_folder, tmp_path):
    """The same with a chat template: `chat_folder(template)`."""

    def make(template):
        folder = tmp_path / "chat"
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.fixture
def data(tmp_path):
    """`data(window=..)`: a Data whose cache is in the test's folder."""
    return lambda **options: Data(**{"window": 16, "cache": str(tmp_path / "cache")} | options)


def write(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


def some_words(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def documents(windows):
    """The documents in the windows, as (ids, loss) lists."""
    return [
        (tokens[segments == s].tolist(), loss[segments == s].tolist())
        for tokens, segments, loss in zip(
            windows.tokens, windows.segments, windows.loss, strict=True
        )
        for s in range(1, segments.max() + 1)
    ]


def words_of(ids):
    return " ".join(VOCAB[i] for i in ids)


@pytest.mark.parametrize("packed", [True, False])
def test_every_document_is_there_exactly_once(tmp_path, tokenizer_folder, data, packed):
    rng = np.random.default_rng(0)
    texts = [some_words(rng, 1, 14) for _ in range(200)]
    path = write(tmp_path / "t.jsonl.gz", [{"text": t} for t in texts])
    windows = tokenize([Source(path=path)], data(pack=packed), tokenizer_folder)
    found = [words_of(ids) for ids, _ in documents(windows)]
    assert sorted(found) == sorted(f"<bos> {t} <eos>" for t in texts)
    assert (windows.tokens[windows.segments == 0] == 0).all()
    assert not windows.loss[windows.segments == 0].any()
    changes = np.diff(windows.segments, axis=1)
    assert set(np.unique(changes)) <= {
        0,
        1,
        *(-np.arange(1, 17)),
    }  # numbered in order, then padding
    meta = windows.meta
    assert meta["documents"] == 200 and meta["windows"] == len(windows)
    assert meta["tokens"] == (windows.segments > 0).sum() == sum(len(t.split()) + 2 for t in texts)
    assert meta["loss_tokens"] == meta["tokens"] - 200  # nothing predicts a document's first token
    assert packed == (meta["fill"] > 0.9)
    assert packed or len(windows) == 200


def test_packing_is_tight_and_bounded():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 900, 5000)
    stream = (Document(np.zeros(n, np.int32), np.zeros(n, bool)) for n in sizes)
    packed = list(pack(stream, 1024, limit=256))
    filled = [sum(len(d.ids) for d in members) for members in packed]
    assert max(filled) <= 1024 and sum(filled) == sizes.sum()
    assert sizes.sum() / (1024 * len(packed)) > 0.97


@pytest.mark.parametrize("policy", ["split", "drop"])
def test_long_documents(tmp_path, tokenizer_folder, data, policy):
    long, short = " ".join(WORDS), "w1 w2"
    path = write(tmp_path / "t.jsonl", [{"text": long}, {"text": short}])
    windows = tokenize([Source(path=path)], data(long_rows=policy), tokenizer_folder)
    pieces = [words_of(ids) for ids, _ in documents(windows)]
    if policy == "drop":
        assert pieces == [f"<bos> {short} <eos>"]
        assert windows.meta["dropped"] == 1 and windows.meta["documents"] == 1
    else:
        whole = next(p for p in pieces if p.startswith("<bos> w0"))
        rest = [p for p in pieces if p != whole and p != f"<bos> {short} <eos>"]
        assert " ".join([whole, *rest]) == f"<bos> {long} <eos>"
        assert windows.meta["split"] == 1 and windows.meta["documents"] == 2
        assert max(len(p.split()) for p in pieces) == 16


def test_cut_keeps_tokens_and_mask_together():
    ids = np.arange(10, dtype=np.int32)
    counts = {"documents": 0, "split": 0, "dropped": 0}
    pieces = list(cut([Document(ids, ids > 6)], 4, "split", counts))
    assert [p.ids.tolist() for p in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [p.loss.tolist() for p in pieces] == [[False] * 4, [False] * 3 + [True], [True] * 2]
    assert counts == {"documents": 1, "split": 1, "dropped": 0}


def test_loss_on_completion_only(tmp_path, tokenizer_folder, data):
    rows = [{"prompt": "w1 w2 w3", "completion": "w4 w5"}, {"prompt": "w6", "completion": "w7"}]
    path = write(tmp_path / "t.jsonl", rows)
    windows = tokenize([Source(path=path)], data(loss_on="completion"), tokenizer_folder)
    learnt = [words_of(np.array(ids)[loss]) for ids, loss in documents(windows)]
    assert learnt == ["w4 w5 <eos>", "w7 <eos>"]
    assert windows.meta["loss_tokens"] == 5
    everything = tokenize([Source(path=path)], data(loss_on="all"), tokenizer_folder)
    assert everything.meta["loss_tokens"] == everything.meta["tokens"] - 2


def test_subword_completion_starts_where_its_first_character_is(tmp_path, data):
    """A byte-level token holds the separating space: it is the completion's, not the prompt's."""
    folder = tmp_path / "bpe"
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(["add two and three gives five"] * 9, vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="!").save_pretrained(
        folder
    )
    rows = [{"prompt": "add two and three", "completion": "gives fivé"}]
    source = Source(path=write(tmp_path / "t.jsonl", rows))
    windows = tokenize([source], data(loss_on="completion", window=64), folder)
    [(ids, loss)] = documents(windows)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(np.array(ids)[loss]) == " gives fivé!"
    assert tokenizer.decode(np.array(ids)[~np.array(loss)]) == "add two and three"


def test_eos_is_not_doubled(tmp_path, tokenizer_folder, data):
    path = write(tmp_path / "t.jsonl", [{"text": "w1 <eos>"}])
    windows = tokenize([Source(path=path)], data(), tokenizer_folder)
    assert [words_of(ids) for ids, _ in documents(windows)] == ["<bos> w1 <eos>"]


CONVERSATION = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


@pytest.mark.parametrize("template", [CHAT, CHAT_MARKED], ids=["prefixes", "generation"])
def test_chat_template_mask(tmp_path, chat_folder, data, template):
    path = write(tmp_path / "t.jsonl", [{"messages": CONVERSATION}])
    options = data(loss_on="completion", window=32)
    windows = tokenize([Source(path=path)], options, chat_folder(template))
    [(ids, loss)] = documents(windows)
    assert words_of(ids) == (
        "user: w1 w2 <eos> assistant: w3 <eos> user: w4 <eos> assistant: w5 w6 <eos>"
    )
    # The generation prompt ends before the answer, so "assistant:" is never learnt.
    assert words_of(np.array(ids)[loss]) == "w3 <eos> w5 w6 <eos>"


def test_chat_template_that_rewrites_earlier_turns(tmp_path, chat_folder, data):
    """Reasoning taken out of earlier turns, as Qwen3's template does: only the last one counts."""
    template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' and loop.last %}w9 {% endif %}{{ m.content }} <eos>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = write(tmp_path / "t.jsonl", [{"messages": CONVERSATION}])
    options = data(loss_on="completion", window=32)
    [(ids, loss)] = documents(tokenize([Source(path=path)], options, chat_folder(template)))
    assert words_of(np.array(ids)[loss]) == "w9 w5 w6 <eos>"


def test_chat_format_wraps_prompt_and_completion(tmp_path, chat_folder, data):
    rows = [{"prompt": "w1", "completion": "w2", "answer": "w2"}]
    source = Source(path=write(tmp_path / "t.jsonl", rows), format="chat")
    folder = chat_folder(CHAT)
    [(ids, loss)] = documents(tokenize([source], data(loss_on="completion"), folder))
    assert words_of(ids) == "user: w1 <eos> assistant: w2 <eos>"
    assert words_of(np.array(ids)[loss]) == "w2 <eos>"
    [problem] = problems(source, load_tokenizer(folder))
    assert words_of(problem.prompt_ids) == "user: w1 <eos> assistant:"


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


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The hub cannot be reached, and nothing is in its cache."""
    import datasets
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


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


LONG_QUESTION = " ".join(WORDS[:20])
SHORT_QUESTION = "How many W30, W31 & w32?"


@pytest.mark.parametrize("field", decontaminate.FIELDS)
def test_planted_questions_are_dropped(tmp_path, tokenizer_folder, data, field):
    questions = write(
        tmp_path / "exam.jsonl.gz", [{field: LONG_QUESTION}, {field: SHORT_QUESTION}, {field: "w1"}]
    )
    rows = [
        {"text": "w39 " + ", ".join(WORDS[4:17]).upper() + " w38"},  # 13 words in a row
        {"text": "w39 " + " ".join(WORDS[4:16]) + " w38"},  # 12 words: clean
        {"text": "w38 how many w30 W31 w32 w33"},  # the whole of a short question
        {"text": "how many w30 w31"},  # a part of it: clean
        {"text": "w1 w2"},  # a question of one word is not looked for
    ]
    source = [Source(path=write(tmp_path / "t.jsonl", rows))]
    windows = tokenize(source, data(window=64), tokenizer_folder, decontaminate=(questions,))
    assert windows.meta["contaminated"] == 2 and windows.meta["documents"] == 3
    unchecked = tokenize(source, data(window=64), tokenizer_folder)
    assert unchecked.meta["contaminated"] == 0 and unchecked.meta["documents"] == 5


def test_known_sets_are_skipped_aloud_without_network(no_network, caplog):
    questions = decontaminate.evaluation_questions(("math-500", "gsm8k"))
    assert questions.skipped == ("math-500", "gsm8k") and not questions.grams
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "local jsonl" in caplog.records[0].message
    with pytest.raises(UserError, match="neither a known set"):
        decontaminate.evaluation_questions(("math500",))
    with pytest.raises(UserError, match=r"absent.jsonl: no such file"):
        decontaminate.evaluation_questions(("absent.jsonl",))


def test_problems(tmp_path, tokenizer_folder, chat_folder):
    rows = [
        {"prompt": "w1 w2", "answer": " 7 ", "messages": CONVERSATION},
        {"prompt": "w3", "answer": 8, "messages": CONVERSATION[:1]},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    plain = problems(Source(path=path, format="completion"), load_tokenizer(tokenizer_folder))
    assert [(words_of(p.prompt_ids), p.prompt, p.answer) for p in plain] == [
        ("<bos> w1 w2", "w1 w2", "7"),
        ("<bos> w3", "w3", "8"),
    ]
    chat = problems(Source(path=path), load_tokenizer(chat_folder(CHAT)))
    assert [words_of(p.prompt_ids) for p in chat] == [
        "user: w1 w2 <eos> assistant: w3 <eos> user: w4 <eos> assistant:",
        "user: w1 w2 <eos> assistant:",
    ]
    with pytest.raises(UserError, match="row 0: no answer in field 'gold'"):
        problems(Source(path=path, answer="gold"), load_tokenizer(tokenizer_folder))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the chain-math checkpoint and data")
def test_problem_prompts_begin_the_training_documents(data):
    folder, path = SHARED / "models/chain-math-24l", str(SHARED / "data/chain-math/test.jsonl")
    source = Source(path=path, rows=("0:50",))
    options = data(window=1024, pack=False, loss_on="completion")
    windows = tokenize([source], options, folder)
    for problem, (ids, loss) in zip(
        problems(source, load_tokenizer(folder)), documents(windows), strict=True
    ):
        assert tuple(ids[: len(problem.prompt_ids)]) == problem.prompt_ids
        assert loss.index(True) == len(problem.prompt_ids)
        assert ids[-1] == 2 and ids[-2] == load_tokenizer(folder).convert_tokens_to_ids(
            problem.answer
        )
