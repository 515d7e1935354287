"""Data and tokenizer of the second model: chain arithmetic and plain text, a sixth of the tokens.

    python benchmarks/second.py --texts wikitext/valid.txt tinystories/sample.txt \
        --out runs/second-data --processes 16
    python run.py train --config configs/second-train.yaml
    python run.py run --config configs/second.yaml

Writes into OUT tokenizer/ (byte-level BPE of the texts' first nine tenths and the task's words),
problems.jsonl.gz and test.jsonl (e3jax/demo/generate.py, longer chains than the bundled model's),
text.jsonl.gz (paragraphs of the texts' first nine tenths, --times over, in an order of their own
each time) and text-held-out.jsonl.gz (the last tenth). The same options give the same bytes.
"""

import argparse
import gzip
import json
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from e3jax.demo.generate import SPECIAL, TOKENS, save_tokenizer, write_problems  # noqa: E402

PARAGRAPH = 400  # characters at least


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = [], []
    for path in options.texts:
        parts = paragraphs(path.read_text(encoding="utf-8"))
        cut = len(parts) * 9 // 10
        train, held_out = train + parts[:cut], held_out + parts[cut:]
    write_tokenizer(options.out / "tokenizer", train, options.vocabulary)
    rng, copies = random.Random(0), []
    for _ in range(options.times):
        copies += rng.sample(train, len(train))
    write_lines(options.out / "text.jsonl.gz", copies)
    write_lines(options.out / "text-held-out.jsonl.gz", held_out)
    most = {"most": options.most, "processes": options.processes}
    write_problems(options.out / "problems.jsonl.gz", options.rows, 11, "train", **most)
    write_problems(options.out / "test.jsonl", options.tests, 11, "test", **most)
    print(f"{len(train)} paragraphs {options.times} times, {len(held_out)} held out: {options.out}")


def paragraphs(text: str) -> list[str]:
    """Lines put together until there are PARAGRAPH characters."""
    found, now = [], ""
    for line in text.splitlines():
        now += line.strip() + "\n" if line.strip() else ""
        if len(now) >= PARAGRAPH:
            found.append(now.strip())
            now = ""
    return found


def write_lines(path: pathlib.Path, texts: list[str]) -> None:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for text in texts:
            # The answer to an empty prompt: with `loss_on: completion` there is loss on all of it.
            file.write((json.dumps({"prompt": "", "completion": text}) + "\n").encode())


def write_tokenizer(folder: pathlib.Path, texts: list[str], vocabulary: int) -> None:
    """The task's words and numbers are a token each, with the space before them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f" {word} = {word} ; {word} ? answer :" for word in TOKENS if word not in SPECIAL]
    tokenizer.train_from_iterator([*texts, *words * 100], trainer)
    save_tokenizer(tokenizer, folder)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="+", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=600_000, help="train problems")
    parser.add_argument("--tests", type=int, default=4000, help="test problems")
    parser.add_argument("--most", type=int, default=8, help="most definitions in a problem")
    parser.add_argument("--times", type=int, default=25, help="how often the texts come")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
