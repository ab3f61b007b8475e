"""Tables and pictures that are made of all benchmarks: up to date, and what they say is there."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from contrast import contrast

pytest.importorskip("transformers", reason="the extra `hf` is not installed")
pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")

from benchmarks.common.marks import MARKS, OTHERS
from benchmarks.overview import __main__ as overview
from benchmarks.overview.draw import Drawn
from benchmarks.overview.pictures import PICTURES
from benchmarks.overview.tables import TABLES, Evidence, update_page

ROOT = Path(__file__).parents[2]
REMADE = "made anew by `make figures`"


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence.load(ROOT / overview.DOCS)


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn.load(ROOT / overview.DRAWN)


@pytest.mark.parametrize("page", overview.PAGES, ids=str)
def test_pages_hold_what_was_measured(page: Path, evidence: Evidence) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert update_page(text, evidence) == text, REMADE


def test_every_table_stands_on_a_page() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in overview.PAGES)
    assert sorted(re.findall(r"<!-- table overview:(\w+) -->", text)) == sorted(TABLES)
    assert "nan" not in text.lower().split()


def test_an_unknown_table_is_an_error(evidence: Evidence) -> None:
    with pytest.raises(ValueError, match="got 'wrong'"):
        update_page("<!-- table overview:wrong -->\n<!-- end -->\n", evidence)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_of_their_data(name: str, evidence: Evidence, drawn: Drawn) -> None:
    picture = (ROOT / overview.DRAWN.parent / name).read_text(encoding="utf-8")
    assert PICTURES[name](drawn, evidence) == picture, REMADE
    root = ElementTree.fromstring(picture)
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    for part in root.iter():
        x, y = part.attrib.get("x"), part.attrib.get("y")
        if x is not None and y is not None and "%" not in x:
            assert -1 <= float(x) <= width
            assert -1 <= float(y) <= height
    tags = {part.tag.rpartition("}")[2] for part in root.iter()}
    assert {"title", "desc"} <= tags


def test_what_was_drawn_is_one_law(drawn: Drawn) -> None:
    keys = drawn.keys[0]
    assert len(keys) == len(set(keys)) == drawn.num_samples
    assert all(of_form == keys for of_form in drawn.forms.values())
    for method, values in drawn.inclusion.items():
        assert len(values) == len(drawn.pieces)
        assert sum(values) == pytest.approx(drawn.num_samples, rel=1e-3), method
    for x in (drawn.sketch, drawn.weights, drawn.attention):
        assert sum(x) == pytest.approx(1, abs=1e-3)


def test_marks_are_told_apart_without_colour() -> None:
    own = {mark for name, mark in MARKS.items()}
    assert len({(mark.line, mark.marker) for mark in own}) == len(own)
    assert len({mark.marker for mark in OTHERS}) == len(OTHERS)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_have_contrast(name: str, scheme: str) -> None:
    """Of text to the paper it stands on: 4.5, as WCAG's level AA asks."""
    text = (ROOT / overview.DRAWN.parent / name).read_text(encoding="utf-8")
    declared = re.findall(r"svg\{(.*?)[;}](?:font|\})", text)[scheme == "dark"]
    colours = dict(re.findall(r"--(\w+):(#\w+)", declared))
    used = set(re.findall(r'<text [^>]*class="(\w+)', text))
    assert used
    for colour in used:
        assert contrast(colours[colour], colours["paper"]) >= 4.5, colour
