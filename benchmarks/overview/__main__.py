"""Makes the tables of README.md and docs/settings.md and the pictures of docs/pictures anew.

They are made of the JSON files in docs, which the benchmarks write; nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.common.records import write_json
from benchmarks.language.model import Unavailable
from benchmarks.overview.draw import Drawn, read_sentence
from benchmarks.overview.pictures import PICTURES
from benchmarks.overview.tables import Evidence, update_page

DOCS = Path("docs")
PAGES = (Path("README.md"), DOCS / "settings.md")
DRAWN = DOCS / "pictures" / "draw.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=__doc__)
    parser.add_argument(
        "--draw",
        action="store_true",
        help=f"let SmolLM2 read the sentence of the picture again, and write {DRAWN}",
    )
    options = parser.parse_args(arguments)
    if options.draw:
        try:
            write_json(DRAWN, read_sentence())
        except Unavailable as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
    evidence, drawn = Evidence.load(DOCS), Drawn.load(DRAWN)
    for name, draw in PICTURES.items():
        (DRAWN.parent / name).write_text(draw(drawn, evidence), encoding="utf-8")
    for page in PAGES:
        text = update_page(page.read_text(encoding="utf-8"), evidence)
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
