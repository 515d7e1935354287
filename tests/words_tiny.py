"""A word-level tokenizer, rows of words as files, and the documents of token windows."""

import gzip
import json

WORDS = [f"w{i}" for i in range(40)]
VOCAB = ["<pad>", "<bos>", "<eos>", "<unk>", "user:", "assistant:", "system:", *WORDS]
BOS, EOS = 1, 2
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT_MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} <eos>{% endgeneration %}{% else %}{{ m.content }} <eos>{% endif %}\n"
    "{% endfor %}"
)


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
