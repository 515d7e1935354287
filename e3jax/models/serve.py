"""Requests through a generator's slots: one that is answered makes room for the next of the queue.

What a request gets depends on itself alone: its randomness is of its own seed and the number of its
tokens so far. (The last bits of the logits may differ with the batch, as they do everywhere.)
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from e3jax import mesh, processes
from e3jax.errors import UserError
from e3jax.models.decoder import Params
from e3jax.models.generate import TOGETHER, Arrival, Generator
from e3jax.models.sample import Sampling

PARTS = 8  # of the slots: so many prompts are read at once
BETWEEN = 16  # tokens after which stop strings are looked for
NARROWEST = 16  # tokens of a row


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be gone on from. Raises UserError for what is no distribution."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # the answer ends with the token that completes one of them
    temperature: float = 0.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        expected = {
            "prompt": (len(self.prompt) > 0, "at least one token"),
            "max_new_tokens": (self.max_new_tokens >= 0, "a count"),
            "stop": ("" not in self.stop, "no empty string"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (0 <= self.top_k < 2**31, "a count, 0 for all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
        }
        for name, (fine, what) in expected.items():
            if not fine:
                raise UserError(f"{name}={getattr(self, name)!r}: expected {what}")

    @property
    def columns(self) -> int:
        """Of the cache, that it takes."""
        return len(self.prompt) + self.max_new_tokens


def serve(
    generator: Generator,
    params: Params,
    requests: Sequence[Request],
    batch: int,
    tokenizer: Any = None,
    tell: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, list[int]]]:
    """(number of a request, token ids of its answer), as they are done: up to and including the
    first end-of-sequence token, or the one that completes a stop string.

    batch: of slots, a multiple of the devices that share rows. tokenizer: where there are stop
    strings. tell: is called now and then with the tokens that were decoded since.
    """
    if not requests:
        return
    shards = mesh.row_shards()
    rows = min(batch, -(-len(requests) // shards) * shards)
    group = max(rows // PARTS // shards, 1) * shards
    columns = -(-max(request.columns for request in requests) // 16) * 16
    sampled = any(r.temperature > 0 or r.repetition_penalty != 1 for r in requests)
    weights = generator.prepare(params)
    slots = generator.empty(weights, rows=rows, columns=columns, sampled=sampled)
    queue = collections.deque(range(len(requests)))
    answers: dict[int, list[int]] = {}
    holder: list[int | None] = [None] * rows  # the request that has each slot

    while queue or any(number is not None for number in holder):
        free = [slot for slot, number in enumerate(holder) if number is None]
        while queue and len(free) >= min(group, len(queue)):
            taking = {free.pop(0): queue.popleft() for _ in range(min(group, len(queue)))}
            for slot, number in taking.items():
                holder[slot], answers[number] = number, []
            slots = generator.admit(
                weights, slots, _arrival(requests, taking, holder, group, sampled)
            )
        held = {slot: number for slot, number in enumerate(holder) if number is not None}
        stops = any(requests[number].stop for number in held.values())
        slots, said = generator.go_on(
            weights,
            slots,
            mesh.share_batch(np.isin(np.arange(rows), list(held))),
            np.int32(min(group, len(queue)) or rows),
            np.int32(BETWEEN if stops else TOGETHER),
        )
        said = processes.whole(said)
        tell(int(np.sum(said >= 0)))
        for slot, number in held.items():
            request, answer = requests[number], answers[number]
            new = said[slot][said[slot] >= 0].tolist()
            answer += new
            end = _stopped(answer, len(new), request.stop, tokenizer) if request.stop else None
            over = end is not None or len(answer) == request.max_new_tokens
            if over or (new and new[-1] in generator.eos):
                holder[slot] = None
                yield number, answers.pop(number)[:end]


def generate(
    generator: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    batch: int,
    max_new_tokens: int,
    tell: Callable[[int], None] = lambda _: None,
) -> Iterator[list[int]]:
    """Greedy answers to all prompts in order, as token ids."""
    requests = [Request(prompt, max_new_tokens) for prompt in prompts]
    early: dict[int, list[int]] = {}
    following = 0
    for number, answer in serve(generator, params, requests, batch, tell=tell):
        early[number] = answer
        while following in early:
            yield early.pop(following)
            following += 1


def padded_width(length: int) -> int:
    """Rows are filled up to a power of two: few programs for all lengths."""
    return max(NARROWEST, 1 << (length - 1).bit_length())


def left_pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segments (0 = padding, 1 = prompt), both int32 [B, width]."""
    tokens = np.zeros((len(prompts), width), np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
        segments[row, width - len(ids) :] = 1
    return tokens, segments


def _arrival(
    requests: Sequence[Request],
    taking: dict[int, int],
    holder: Sequence[int | None],
    group: int,
    sampled: bool,
) -> Arrival:
    """The requests that take slots over, of `group` rows; filled up with the first of them."""
    prompts = [requests[number].prompt for number in taking.values()]
    width = padded_width(max(map(len, prompts)))
    tokens, segments = left_pad(prompts + prompts[:1] * (group - len(prompts)), width)
    source, left = np.full(len(holder), -1, np.int32), np.zeros(len(holder), np.int32)
    for row, (slot, number) in enumerate(taking.items()):
        source[slot], left[slot] = row, requests[number].max_new_tokens
    sampling = None
    if sampled:
        nobody = Request([0], 0)
        of_slots = [nobody if number is None else requests[number] for number in holder]

        def of(name: str, dtype: Any) -> Any:
            return mesh.share_batch(np.array([getattr(r, name) for r in of_slots], dtype))

        sampling = Sampling(
            temperature=of("temperature", np.float32),
            top_k=of("top_k", np.int32),
            top_p=of("top_p", np.float32),
            min_p=of("min_p", np.float32),
            repetition_penalty=of("repetition_penalty", np.float32),
            seed=of("seed", np.uint32),
        )
    return Arrival(
        tokens=mesh.share_batch(tokens),
        segments=mesh.share_batch(segments),
        source=mesh.share_batch(source),
        left=mesh.share_batch(left),
        sampling=sampling,
    )


def _stopped(ids: list[int], new: int, stop: Sequence[str], tokenizer: Any) -> int | None:
    """How many tokens an answer has when the first stop string is complete, if it is with the last
    `new` ones. Special tokens are text too."""
    # A character has no more than four tokens: bytes.
    reach = 4 * max(map(len, stop)) + 4

    def has(end: int, begin: int) -> bool:
        text = tokenizer.decode(ids[max(begin - reach, 0) : end], skip_special_tokens=False)
        return any(string in text for string in stop)

    first = len(ids) - new
    if not has(len(ids), first):
        return None
    return next((end for end in range(first + 1, len(ids)) if has(end, end)), len(ids))
