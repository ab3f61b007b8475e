"""HTML pages of the benchmarks: they fit narrow screens, and can be read in the light and dark."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from contrast import contrast

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")

from matplotlib.figure import Figure

from benchmarks.common import page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
WORDS = ["sketch", "sample", "gather", "anti", "dis", "establish"] * 30


def figure(width: float) -> Figure:
    made = Figure(figsize=(width, 3))
    made.add_subplot().plot([1, 2, 3])
    return made


def example() -> str:
    """A page with all that reports are made of."""
    rates = [1.0 + 9 * (i % 7) / 6 for i in range(len(WORDS))]
    rows = [[f"column {i}" for i in range(12)], *(["a value"] * 12 for _ in "123")]
    return page.html_page(
        "A page",
        page.html_table(rows)
        + page.side_by_side([page.svg_figure(figure(4.4), f"Panel {i}.") for i in "abc"])
        + page.svg_figure(figure(12), "A wide one.", wide=True)
        + page.png_figure(figure(12), "A wide one of pixels.", wide=True)
        + f"<blockquote>{page.marked_text(WORDS, [True] * len(WORDS), rates, 400)}</blockquote>"
        + '<p class="note">Small words.</p>',
    )


def test_figures_say_what_they_show() -> None:
    text = example()
    assert text.count("<figcaption>") == text.count("<figure>") == 5
    assert text.count('role="img"') == 4
    assert text.count("<title>") == 1 + 4
    assert not re.findall(r"<img (?!alt)", text)
    assert text.count('<div class="scroll" tabindex="0">') == 3


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast(scheme: int) -> None:
    """4.5 at least, as WCAG's level AA asks, on the darkest mark, too."""
    declared = re.findall(r":root \{(.*?)\}", page._STYLE, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", declared))
    red, green, blue = map(int, re.findall(r"--mark: (\d+) (\d+) (\d+)", declared)[0])
    assert contrast(colours["ink"], colours["paper"]) >= 7
    assert contrast(colours["quiet"], colours["paper"]) >= 4.5
    assert contrast(colours["ink"], f"#{red:02x}{green:02x}{blue:02x}") >= 4.5


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, which Debian has")
@pytest.mark.parametrize("width", [400, 1300])
def test_a_browser_shows_it_without_sideways_scroll(width: int, tmp_path: Path) -> None:
    """Within a frame of that width, as browsers have windows of their own least width."""
    assert BROWSER is not None
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe id="frame" width="{width}" height="800" srcdoc="{html.escape(example())}">'
        "</iframe><script>onload = () => { const page = document.getElementById('frame')"
        ".contentDocument; const panels = [...page.querySelectorAll('.figures figure')]"
        ".map(x => x.offsetTop); document.title = [page.documentElement.scrollWidth,"
        " new Set(panels).size].join(' '); }</script>"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    shown = subprocess.run([*command, outer.as_uri()], capture_output=True, text=True, timeout=120)
    (told,) = re.findall(r"<title>(\d+ \d+)</title>", shown.stdout)
    scroll_width, rows = map(int, told.split())
    assert scroll_width <= width
    assert rows == (3 if width == 400 else 1)  # panels stand below each other where it is narrow
