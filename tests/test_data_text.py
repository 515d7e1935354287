"""Rows become token windows: rendering, loss on completions, packing; problems; what is known."""

import pathlib

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from e3jax.config import Source
from e3jax.data import decontaminate
from e3jax.data.text import load_tokenizer, problems, tokenize
from e3jax.data.windows import Document, cut, pack
from e3jax.errors import UserError
from words_tiny import CHAT, CHAT_MARKED, WORDS, documents, some_words, words_of, write

SHARED = pathlib.Path(__file__).parents[2] / "shared"


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
    [problem] = problems(source, load_tokenizer(folder), 64)
    assert words_of(problem.prompt_ids) == "user: w1 <eos> assistant:"


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
    of = lambda source, *more: list(problems(source, *more))
    plain = of(Source(path=path, format="completion"), load_tokenizer(tokenizer_folder), 64)
    assert [(words_of(p.prompt_ids), p.prompt, p.answer) for p in plain] == [
        ("<bos> w1 w2", "w1 w2", "7"),
        ("<bos> w3", "w3", "8"),
    ]
    chat = of(Source(path=path), load_tokenizer(chat_folder(CHAT)), 64)
    assert [words_of(p.prompt_ids) for p in chat] == [
        "user: w1 w2 <eos> assistant: w3 <eos> user: w4 <eos> assistant:",
        "user: w1 w2 <eos> assistant:",
    ]
    with pytest.raises(UserError, match="row 0: no answer in field 'gold'"):
        of(Source(path=path, answer="gold"), load_tokenizer(tokenizer_folder), 64)
    with pytest.raises(UserError, match="row 0: a prompt of 3 tokens fills the model's context"):
        of(Source(path=path, format="completion"), load_tokenizer(tokenizer_folder), 3)
    # A row that nobody asks for may be wrong.
    path = write(tmp_path / "more.jsonl", [*rows, {"prompt": "w4"}])
    source = Source(path=path, format="completion")
    rows = problems(source, load_tokenizer(tokenizer_folder), 64)
    assert [next(rows).answer, next(rows).answer] == ["7", "8"]
    with pytest.raises(UserError, match="row 2: no answer"):
        next(rows)


def test_an_instruction_ends_the_prompt(tmp_path, tokenizer_folder, chat_folder, data):
    """In plain prompts and the user's turn, of problems as of what is trained on."""
    row = {"prompt": "w1 w2", "completion": "w3", "answer": "5"}
    path = write(tmp_path / "rows.jsonl", [row])
    chat = load_tokenizer(chat_folder(CHAT))
    told = Source(path=path, format="chat", instruction=" w9")
    assert next(problems(told, chat, 99)).prompt == "user: w1 w2 w9 <eos>\nassistant: "
    plain = Source(path=path, instruction=" w9")
    assert next(problems(plain, load_tokenizer(tokenizer_folder), 99)).prompt == "w1 w2 w9"
    windows = tokenize([plain], data(), tokenizer_folder)
    assert [words_of(ids) for ids, _ in documents(windows)] == ["<bos> w1 w2 w9 w3 <eos>"]
    other = tokenize([Source(path=path)], data(), tokenizer_folder)
    assert other.fingerprint != windows.fingerprint
    turns = [{"role": "user", "content": "w1"}]
    path = write(tmp_path / "turns.jsonl", [{"messages": turns, "answer": "5"}])
    with pytest.raises(UserError, match="instruction"):
        next(problems(Source(path=path, instruction=" w9"), chat, 99))
    path = write(tmp_path / "plain.jsonl", [{"text": "w1"}])
    with pytest.raises(UserError, match="plain text has none"):
        tokenize([Source(path=path, instruction=" w9")], data(), tokenizer_folder)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the chain-math checkpoint and data")
def test_problem_prompts_begin_the_training_documents(data):
    folder, path = SHARED / "models/chain-math-24l", str(SHARED / "data/chain-math/test.jsonl")
    source = Source(path=path, rows=("0:50",))
    options = data(window=1024, pack=False, loss_on="completion")
    windows = tokenize([source], options, folder)
    for problem, (ids, loss) in zip(
        problems(source, load_tokenizer(folder), 1024), documents(windows), strict=True
    ):
        assert tuple(ids[: len(problem.prompt_ids)]) == problem.prompt_ids
        assert loss.index(True) == len(problem.prompt_ids)
        assert ids[-1] == 2 and ids[-2] == load_tokenizer(folder).convert_tokens_to_ids(
            problem.answer
        )
