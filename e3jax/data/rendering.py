"""A row of a data set -> one string, and what of it carries loss -> token ids and loss mask."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from e3jax.config import Source
from e3jax.data.sources import Rows
from e3jax.data.windows import Document
from e3jax.errors import UserError

TOGETHER = 512  # documents tokenised at a time, in parallel by the tokenizers library


class Rendered(NamedTuple):
    """A document as one string.

    taught: character ranges [start, stop) that carry loss; a stop of None takes the EOS along.
    plain: the tokenizer adds BOS and the like, and EOS is appended; otherwise a chat template has
      written them.
    """

    text: str
    taught: tuple[tuple[int, int | None], ...]
    plain: bool = True


def render(rows: Rows, tokenizer: Any, loss_on: str, counts: dict[str, int]) -> Iterator[Rendered]:
    """The documents of a source; empty ones are left out and counted.

    Raises UserError that names the row and field when one is missing or of a wrong type.
    """
    source, form = rows.source, None
    for number, row in rows:
        where = f"{source.path}: row {number}"
        form = form or training_format(source, row, loss_on)
        if form == "text":
            text = content = _string(row, source.text, where)
            document = Rendered(text, ((0, None),))
        elif form == "completion":
            before = _prompt(source, row, where) + source.separator
            content = _string(row, source.completion, where)
            start = len(before) if loss_on == "completion" else 0
            document = Rendered(before + content, ((start, None),))
        else:
            turns = conversation(source, row, form, where)
            content = "".join(turn["content"] for turn in turns if turn["role"] == "assistant")
            document = _chat(turns, tokenizer, where, loss_on)
        if content.strip():
            yield document
        else:
            counts["empty"] += 1


def training_format(source: Source, row: dict[str, Any], loss_on: str) -> str:
    """`source.format`, or for `auto` the format whose fields the row has."""
    form = source.format
    if form == "auto":
        needs = {
            "messages": (source.messages,),
            "completion": (source.prompt, source.completion),
            "text": (source.text,),
        }
        form = next((f for f, names in needs.items() if all(n in row for n in names)), "auto")
    if form == "auto":
        raise UserError(
            f"{source.path}: none of the fields {source.messages!r}, {source.prompt!r} with "
            f"{source.completion!r}, or {source.text!r}; it has {', '.join(row)}. Name the fields "
            "in the source (text:, prompt: and completion:, or messages:)"
        )
    if form == "text" and loss_on == "completion":
        raise UserError(
            f"{source.path}: data.loss_on is completion, but plain text has none; use "
            "loss_on: all, or a source with prompt and completion or messages"
        )
    if form == "text" and source.instruction:
        raise UserError(f"{source.path}: `instruction` goes with a prompt; plain text has none")
    return form


def conversation(source: Source, row: dict[str, Any], form: str, where: str) -> list[dict]:
    """The chat turns of a row; for form `chat`, of its prompt and, where it has one, completion."""
    if form == "chat":
        turns = [{"role": "user", "content": _prompt(source, row, where)}]
        if source.completion in row:
            completion = _string(row, source.completion, where)
            turns.append({"role": "assistant", "content": completion})
        return turns
    if source.instruction:
        raise UserError(
            f"{source.path}: `instruction` goes with a prompt; these rows have messages"
        )
    turns = _field(row, source.messages, where)
    for turn in turns if isinstance(turns, list) and turns else [None]:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise UserError(
                f"{where}: field {source.messages!r} is not a list of {{role, content}} with text "
                f"in both: {str(turn if turn is not None else turns)[:120]}"
            )
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def apply_template(turns: Sequence[dict], tokenizer: Any, where: str, **options: Any) -> Any:
    """The tokenizer's chat template on these turns, as a string unless `tokenize=True`."""
    try:
        return tokenizer.apply_chat_template(list(turns), **{"tokenize": False} | options)
    except Exception as error:  # templates raise what they like
        if tokenizer.chat_template is None:
            raise UserError(
                f"{where}: messages need a chat template, and the tokenizer "
                f"{tokenizer.name_or_path} has none; use prompt and completion or text"
            ) from error
        raise UserError(f"{where}: the chat template refuses these messages: {error}") from error


def _chat(turns: list[dict], tokenizer: Any, where: str, loss_on: str) -> Rendered:
    whole = apply_template(turns, tokenizer, where)
    if loss_on == "all":
        taught = ((0, None),)
    elif re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        taught = tuple(_generation_ranges(turns, tokenizer, where))
    else:
        taught = tuple(
            _turn_ranges(turns, whole, lambda t, **o: apply_template(t, tokenizer, where, **o))
        )
    return Rendered(whole, taught, plain=False)


def _generation_ranges(turns: list[dict], tokenizer: Any, where: str) -> Iterator[tuple[int, int]]:
    """Character ranges that the template itself marks with {% generation %}."""
    marked = apply_template(
        turns,
        tokenizer,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans = zip(marked["assistant_masks"], marked["offset_mapping"], strict=True)
    for taught, run in itertools.groupby(spans, key=lambda span: span[0]):
        if taught:
            offsets = [offset for _, offset in run]
            yield offsets[0][0], offsets[-1][1]


def _turn_ranges(
    turns: list[dict], whole: str, template: Callable[..., str]
) -> Iterator[tuple[int, int]]:
    """Character ranges of the assistant's turns, from renderings of the conversation's beginnings.

    A turn begins where the generation prompt before it ends. An earlier turn that the template
    rewrites once others follow (Qwen3 takes the reasoning out) was never generated in that form,
    and carries no loss.
    """
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = template(turns[:i], add_generation_prompt=True) if i else ""
            through = template(turns[: i + 1]) if i + 1 < len(turns) else whole
            if whole.startswith(through):
                same = itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)
                )
                yield sum(1 for _ in same), len(through)


def encode(rendered: Iterable[Rendered], tokenizer: Any) -> Iterator[Document]:
    """Token ids and loss mask of each document, tokenised as one string with its EOS.

    A token across the border of prompt and completion belongs to the completion.
    """
    for plain, group in itertools.groupby(rendered, key=lambda document: document.plain):
        while batch := list(itertools.islice(group, TOGETHER)):
            encoded = tokenizer(
                [document.text for document in batch],
                add_special_tokens=plain,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for i, (document, ids) in enumerate(zip(batch, encoded["input_ids"], strict=True)):
                if plain and tokenizer.eos_token_id not in (None, ids[-1] if ids else None):
                    ids = [*ids, tokenizer.eos_token_id]
                loss = np.zeros(len(ids), bool)
                for start, stop in document.taught:
                    loss[_tokens(encoded, i, start, stop, len(document.text))] = True
                yield Document(np.asarray(ids, np.int32), loss)


def _tokens(encoded: Any, i: int, start: int, stop: int | None, size: int) -> slice:
    """The tokens of text i with the characters [start, stop); a stop of None takes all the rest."""

    def first(characters: Iterable[int]) -> int | None:
        found = (encoded.char_to_token(i, c) for c in characters)  # None on white space between
        return next((token for token in found if token is not None), None)

    begin = first(range(start, size if stop is None else stop))
    last = None if stop is None else first(range(stop - 1, start - 1, -1))
    if begin is None:
        return slice(0)
    return slice(begin, None if last is None else last + 1)


def prompt_of(source: Source, row: dict[str, Any], tokenizer: Any, where: str) -> Rendered:
    """What stands before the completion when the model is to write it."""
    form = source.format
    if form == "auto":
        form = "messages" if source.messages in row else "completion"
    if form in ("messages", "chat"):
        turns = conversation(source, row, form, where)
        while len(turns) > 1 and turns[-1]["role"] == "assistant":
            turns.pop()
        text = apply_template(turns, tokenizer, where, add_generation_prompt=True)
        return Rendered(text, (), plain=False)
    # A trailing space would be a token of its own, where the text has it in the next word's token.
    return Rendered((_prompt(source, row, where) + source.separator).rstrip(" "), ())


def _prompt(source: Source, row: dict[str, Any], where: str) -> str:
    return _string(row, source.prompt, where) + source.instruction


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise UserError(
            f"{where}: no field {name!r}; it has "
            f"{', '.join(k for k in row if row[k] is not None)}. Name the right field in the "
            "source, or leave the row out with `rows`"
        )
    return row[name]


def _string(row: dict[str, Any], name: str, where: str) -> str:
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
    return value
