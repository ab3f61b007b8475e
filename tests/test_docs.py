"""Every Python block of README.md and of the pages in docs runs, and type checkers accept it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The blocks of one more page need several processes: tests/distributed runs them.
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "distributed"),
]
_PART = re.compile(
    r"^#+ (?P<heading>[^\n]*)$|(?P<slow><!-- slow -->\n)?^```python\n(?P<code>.*?)^```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A block of code, and the page and the heading that it stands below."""

    page: str
    heading: str
    code: str
    slow: bool

    @property
    def name(self) -> str:
        words = re.sub(r"\W+", "_", f"{self.page}_{self.heading}").strip("_")
        return words.lower()


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        heading = ""
        for part in _PART.finditer(page.read_text(encoding="utf-8")):
            heading = part["heading"] or heading
            if part["code"]:
                found.append(Block(page.stem, heading, part["code"], part["slow"] is not None))
    return found


BLOCKS = blocks()


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.slow else [])
        for block in BLOCKS
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed
def test_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in block.code:
        pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    if "Trainer" in block.code:
        pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each block as a file, and the examples."""
    folder = tmp_path_factory.mktemp("blocks")
    for number, block in enumerate(BLOCKS):
        (folder / f"{block.name}_{number}.py").write_text(block.code)
    return sorted(folder.iterdir())


def test_mypy_accepts_blocks(sources: list[Path]) -> None:
    pytest.importorskip("mypy", reason="the type checker is not installed")
    command = [sys.executable, "-m", "mypy", "--config-file=pyproject.toml"]  # which is strict
    result = subprocess.run([*command, *sources], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_pyright_accepts_blocks_and_examples(sources: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("basedpyright", reason="the type checker is not installed")
    examples = sorted((ROOT / "examples").glob("*.py"))
    settings = {
        "include": [str(path) for path in (*sources, *examples)],
        "extraPaths": [str(ROOT)],
        "stubPath": "stubs",
        "typeCheckingMode": "standard",  # as pyright's own
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    # Largely untyped, as pyproject.toml says to mypy, and minutes to read.
    for module in ("transformers", "transformers/modeling_utils", "transformers/cache_utils"):
        stub = tmp_path / "stubs" / module / "__init__.pyi"
        stub.parent.mkdir(parents=True)
        stub.write_text("from typing import Any\ndef __getattr__(name: str) -> Any: ...\n")
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    result = subprocess.run([*command, "-p", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_pictures_are_told_in_words(page: Path) -> None:
    """`make docs` finds links that lead nowhere; nothing finds a picture without a text."""
    for words, _ in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8")):
        assert len(words.split()) > 2


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
