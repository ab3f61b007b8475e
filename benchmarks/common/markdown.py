"""Markdown tables, and pages whose marked tables are made anew while their prose stays.

A table goes between the lines ``<!-- table STEM:NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Source = TypeVar("Source")

# A block ends before the next one begins; without its end the last group is missing.
_BLOCK = re.compile(
    r"(<!-- table (\S+):(\S+) -->\n)((?:(?!<!-- table ).)*?(?=<!-- end -->))?", re.DOTALL
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, ending with a line break."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def update_tables(markdown: str, make: Callable[[str, str], str | None]) -> str:
    """`markdown` with what stands between its markers replaced.

    Args:
        markdown: the page.
        make: called with STEM and NAME of each marker; gives the new content, which ends with a
            line break, or None to leave the old one.

    Raises:
        ValueError: a marker has no end; also what `make` raises.
    """

    def replace(match: re.Match[str]) -> str:
        opening, stem, name, old = match.groups()
        if old is None:
            raise ValueError(f"table {stem}:{name} must end with <!-- end -->")
        new = make(stem, name)
        return opening + (old if new is None else new)

    return _BLOCK.sub(replace, markdown)


def update_page(
    page: Path, stem: str, made_of: Source, tables: Mapping[str, Callable[[Source], str]]
) -> None:
    """Make the tables of ``stem`` in the file ``page`` anew.

    Args:
        page: Markdown.
        stem: whose tables; those of others stay.
        made_of: what the tables are made of.
        tables: by NAME, what makes them.

    Raises:
        ValueError: a marker of ``stem`` names no table.
    """

    def make(found: str, name: str) -> str | None:
        if found != stem:
            return None
        if name not in tables:
            raise ValueError(f"table must be one of {sorted(tables)}, got {name!r}")
        return tables[name](made_of)

    page.write_text(update_tables(page.read_text(encoding="utf-8"), make), encoding="utf-8")
