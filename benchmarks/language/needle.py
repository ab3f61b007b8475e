"""A needle in a haystack: facts planted in a long text, asked for at its end."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.language.attention import DENSE, OURS, WINDOW, attending, new_cache
from benchmarks.language.model import Passage, Tokenizer, forget_after, forward, greedy

_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Five facts in a text, as many as depths, cost one reading of it; each is asked for alone. They are
# unlike, as so small a model mistakes one secret number for another.
_FACTS = {
    "The secret number of the tower is": (
        "What is the secret number of the tower?",
        ("7311", "1663", "5242", "9376", "4825", "2094"),
    ),
    "The favourite fruit of Anna is": (
        "What is the favourite fruit of Anna?",
        ("papaya", "mango", "melon", "cherry", "lemon", "banana"),
    ),
    "The password of the library is": (
        "What is the password of the library?",
        ("thunder", "velvet", "marble", "copper", "window", "garden"),
    ),
    "The name of the black horse is": (
        "What is the name of the black horse?",
        ("Biscuit", "Shadow", "Pepper", "Comet", "Jasper", "Rocket"),
    ),
    "The brother of Peter lives in": (
        "Where does the brother of Peter live?",
        ("Lisbon", "Cairo", "Oslo", "Lima", "Dublin", "Kyoto"),
    ),
}
_BEGIN = "<|im_start|>user\n"
_QUESTION = "\n\n{question}<|im_end|>\n<|im_start|>assistant\n{fact}"
_ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """To one question.

    Attributes:
        attention: how text and question were read.
        num_samples: K. None: dense.
        depth: of the fact, 0 at the beginning of the text and 1 at its end.
        right: exactly the answer was written.
        written: what was written.
        answer: what was asked for.
    """

    attention: str
    num_samples: int | None
    depth: float
    right: bool
    written: str
    answer: str

    def __str__(self) -> str:
        verdict = "right" if self.right else "wrong"
        return f"{self.answer} at {self.depth:.0%}, {self.attention}: {verdict}, {self.written!r}"


@dataclass(frozen=True)
class Haystack:
    """A text with facts in it.

    Attributes:
        tokens: int64 [1, N].
        facts, answers: beginning and end of each, in the order of ``_DEPTHS``.
    """

    tokens: Tensor
    facts: list[str]
    answers: list[str]


def plant(tokenizer: Tokenizer, passage: Passage, seed: int) -> Haystack:
    """Facts in a passage, whose end is left out so that its length stays."""
    chance = random.Random(seed)
    facts = chance.sample(list(_FACTS), len(_DEPTHS))
    answers = [chance.choice(_FACTS[fact][1]) for fact in facts]
    planted = [
        tokenizer.encode(f"\n\n{fact} {answer}.\n\n")
        for fact, answer in zip(facts, answers, strict=True)
    ]
    tokens = tokenizer.encode(_BEGIN)
    text = passage.tokens[0].tolist()
    text = text[: len(text) - len(tokens) - sum(map(len, planted))]
    begin = 0
    for depth, fact in zip(_DEPTHS, planted, strict=True):
        end = int(depth * len(text))
        tokens += text[begin:end] + fact
        begin = end
    return Haystack(torch.tensor([tokens + text[begin:]]), facts, answers)


@torch.no_grad()
def ask(
    model: Any,
    tokenizer: Tokenizer,
    haystack: Haystack,
    attention: str,
    num_samples: int | None = None,
) -> list[Answer]:
    """One answer for each fact; the text is read once."""
    answers = []
    with attending(model, attention, num_samples):
        kept = new_cache(model, attention)
        forward(model, haystack.tokens, kept)
        for depth, fact, answer in zip(_DEPTHS, haystack.facts, haystack.answers, strict=True):
            forget_after(kept, haystack.tokens.shape[1])
            text = _QUESTION.format(question=_FACTS[fact][0], fact=fact)
            question = torch.tensor([tokenizer.encode(text)])
            written = tokenizer.decode(list(islice(greedy(model, question, kept), _ANSWER_TOKENS)))
            words = re.findall(r"\w+", written)
            right = words[:1] == [answer]
            answers.append(Answer(attention, num_samples, depth, right, written, answer))
    return answers


def measure_needle(
    model: Any, tokenizer: Tokenizer, passages: Sequence[Passage], num_samples: int
) -> Iterator[Answer]:
    """Answers of dense attention, ours, and sinks and window, to the same questions."""
    for seed, passage in enumerate(passages):
        haystack = plant(tokenizer, passage, seed)
        yield from ask(model, tokenizer, haystack, DENSE)
        yield from ask(model, tokenizer, haystack, OURS, num_samples)
        yield from ask(model, tokenizer, haystack, WINDOW, num_samples)
