"""How did it go on? Words of a real text that occur in it once, asked for what followed them.

The texts are those of `benchmarks.learning.tasks.sotu`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Encoding

from benchmarks.learning.tasks.config import Config
from benchmarks.learning.tasks.data import IGNORED, Batch, majority_share
from benchmarks.learning.tasks.mqar import Mqar
from benchmarks.learning.tasks.recall import Recall, draw_distinct
from benchmarks.learning.tasks.sotu import Corpus


class Continuation(Recall):
    """A passage of N - P tokens of a State of the Union address, then P tokens of it that ask.

    A token asks for the one that followed it in the passage, where it occurs once; which token
    that is, is left to chance. A passage with fewer than P such tokens asks for some again, and one
    without any (there are hardly such) for any of its tokens. As in
    `Mqar` the answer stands where content decides, but every token is both what is asked for and
    an answer, tokens are as common as they are in English, and some answers can be guessed from
    the token that asks. Splits, tokenizer and masking of numbers are those of `Sotu`.

    Raises:
        ValueError: `seq_len` and `num_pairs` do not fit together, or no address is as long.
        RunError: the package `sotu` is not installed.
    """

    # The recipe that lets dense attention learn `mqar` serves here too.
    defaults: ClassVar[dict[str, Any]] = {**Mqar.defaults, "vocab_size": 256, "steps": 1200}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._corpus = Corpus(self.vocab_size)
        self.vocab_size = self.num_classes = self._corpus.tokenizer.get_vocab_size()
        # Passages of a document that start at every token but those near its end.
        self._starts = {
            split: np.array([max(0, len(ids) - self.seq_len + 1) for ids in documents])
            for split, documents in self._corpus.documents.items()
        }
        for split, starts in self._starts.items():
            if not starts.any():
                raise ValueError(
                    f"seq_len must be at most the {split} split's longest address, "
                    f"{max(map(len, self._corpus.documents[split]))} tokens, got {self.seq_len}"
                )
        labels = torch.cat([batch.targets.flatten() for batch in self.eval_batches("test")])
        self.majority_accuracy = majority_share(labels[labels != IGNORED].numpy())
        self.fingerprint = f"continuation-1 {self.seq_len} {self.num_pairs} {self._corpus.digest}"

    def token_name(self, token: int) -> str:
        """The piece of text that the tokenizer made a token of."""
        return self._corpus.token_name(token)

    def read(self, text: str) -> tuple[str, Encoding]:
        """Any text as the model is shown passages; see `Corpus.read`."""
        return self._corpus.read(text, self.seq_len)

    def _generate(
        self, split: str, random: np.random.Generator, count: int, seq_len: int, questions: int
    ) -> Batch:
        passage = self._passages(split, random, count, seq_len - questions)
        rows = np.arange(count)[:, None]
        counts = np.zeros((count, self.vocab_size), dtype=np.int32)
        np.add.at(counts, (rows, passage), 1)
        once = counts[rows, passage] == 1
        once[:, -1] = False  # nothing follows
        once[~once.any(axis=1), :-1] = True
        places = draw_distinct(random, once.astype(np.float64), passage.shape[1])
        asked = places[rows, np.arange(questions) % once.sum(axis=1)[:, None]]
        tokens = np.concatenate([passage, passage[rows, asked]], axis=1)
        targets = np.full((count, seq_len), IGNORED, dtype=np.int64)
        targets[:, -questions:] = passage[rows, asked + 1]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def _passages(
        self, split: str, random: np.random.Generator, count: int, length: int
    ) -> npt.NDArray[np.int64]:
        """Passages [count, length] that start at any token that N tokens of an address follow."""
        starts = self._starts[split]
        ends = np.cumsum(starts)
        places = random.integers(ends[-1], size=count)
        documents = np.searchsorted(ends, places, side="right")
        firsts = places - (ends - starts)[documents]
        held = self._corpus.documents[split]
        return np.stack(
            [
                held[document][first : first + length]
                for document, first in zip(documents, firsts, strict=True)
            ]
        ).astype(np.int64)
