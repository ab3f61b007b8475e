"""The demonstration: what its report says about given numbers, and that it runs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
pytest.importorskip("tokenizers", reason="the extra `bench` is not installed")

from benchmarks.learning.demo import __main__ as demo
from benchmarks.learning.demo.measure import Passage, Timing, time_lengths
from benchmarks.learning.demo.report import (
    Findings,
    busiest_stretch,
    favourite_words,
    page,
    summary_table,
    verdicts,
)
from benchmarks.learning.tasks import Result, default_config
from benchmarks.learning.tasks.sotu import Address

PIECES = ["Fellow", "citi", "zens", "<b>", "&", "so", "on", "."]


def make_result(attention: str, accuracy: float, seconds: float, peak_mib: float) -> Result:
    return Result(
        config=default_config("sotu", attention=attention, steps=10),
        test_loss=1.0,
        test_accuracy=accuracy,
        valid_loss=1.0,
        valid_accuracy=accuracy,
        majority_accuracy=0.2,
        seconds=seconds,
        peak_mib=peak_mib,
        parameters=1234,
    )


def make_findings(
    dense_accuracy: float = 0.8,
    smartbird_accuracy: float = 0.6,
    smartbird_seconds: float = 5.0,
    smartbird_peak: float = 400.0,
) -> Findings:
    # Every token draws the second and the third one, and itself.
    draws = torch.tensor([1, 2]).expand(16, len(PIECES), 2)
    own = torch.arange(len(PIECES))[:, None].expand(16, -1, -1)
    row = {"step": 10, "loss": 1.0, "accuracy": 0.5, "seconds": 3.0, "peak_mib": 9.0}
    rows = [{**row, "split": "train"}, {**row, "split": "valid"}]
    return Findings(
        results={
            "dense": make_result("dense", dense_accuracy, 10.0, 500.0),
            "smartbird": make_result(
                "smartbird", smartbird_accuracy, smartbird_seconds, smartbird_peak
            ),
        },
        rows={"dense": rows, "smartbird": rows},
        timings=[Timing(512, 1.0, 2.0, 3.0, 4.0), Timing(1024, 4.0, 3.0, 12.0, 6.0)],
        passage=Passage(
            address=Address(1900, "A. <President>", "None", "text"),
            pieces=PIECES,
            words=["Fellow", "citizens", "citizens", *PIECES[3:]],
            begins=[True, True, False, True, True, True, True, True],
            draws={"layer 1": torch.cat([draws, own], -1), "layer 2": own},
            period="1886 to 1900",
            answer="1901 to 1912",
            test_passages=100,
        ),
    )


def test_table() -> None:
    lines = summary_table(make_findings()).splitlines()
    assert lines[0].split()[:3] == ["attention", "test", "accuracy"]
    assert re.split(r"\s{2,}", lines[1]) == [
        *("dense", "80.0%", "20.0%", "1.00 s", "500 MiB", "1,234"),
    ]
    assert re.split(r"\s{2,}", lines[2]) == [
        *("Smart Bird", "60.0%", "20.0%", "0.50 s", "400 MiB", "1,234"),
    ]


def test_verdicts_name_the_better_one() -> None:
    accuracy, time, memory, forward, backward = verdicts(make_findings())
    # Standard error of the gap: sqrt((0.8 * 0.2 + 0.6 * 0.4) / 100) = 6.3 points.
    assert accuracy.startswith("Dense is right 20.0 points more often than Smart Bird on the 100")
    assert "beyond" in accuracy
    assert "12.6 points" in accuracy
    assert "2.00 times less time with Smart Bird" in time
    assert "1.25 times less memory with Smart Bird" in memory
    assert "dense is faster at 512 tokens" in forward
    assert "1.33 times as fast as dense at 1024" in forward
    assert "2.00 times as fast as dense at 1024" in backward


def test_verdicts_say_where_dense_is_better_and_where_nothing_differs() -> None:
    findings = make_findings(0.5, 0.5, smartbird_seconds=20.0, smartbird_peak=501.0)
    accuracy, time, memory, *_ = verdicts(findings)
    assert accuracy.startswith("Both are right equally often")
    assert "2.00 times more time with Smart Bird: dense is better here" in time
    assert "about as much memory with either" in memory


def test_verdicts_admit_noise_and_failure() -> None:
    accuracy = verdicts(make_findings(0.15, 0.25))[0]
    assert accuracy.startswith("Smart Bird is right 10.0 points more often than dense")
    assert "within" in accuracy
    assert "dense has not learned to beat the majority class" in accuracy
    assert "Smart Bird has not learned" not in accuracy


def test_smart_bird_faster_everywhere() -> None:
    findings = dataclasses.replace(make_findings(), timings=[Timing(512, 2.0, 1.0, 2.0, 1.0)])
    assert "faster at every length measured" in verdicts(findings)[-1]


class Tags(HTMLParser):
    """Collects the tags of a page and the addresses it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_is_complete_in_itself_and_escaped() -> None:
    findings = make_findings()
    text = page(findings)
    tags = Tags()
    tags.feed(text)
    assert not [url for url in tags.loaded if not url.startswith("data:")]
    # Three learning curves, two of times, and arcs of two layers; the heat maps are one image.
    assert tags.tags.count("svg") == 7
    assert tags.tags.count("img") == 1
    assert "b" not in tags.tags
    assert "&lt;b&gt;" in text
    assert "A. &lt;President&gt;" in text
    for sentence in verdicts(findings):
        assert sentence in text


def test_favourite_words_are_those_drawn_most() -> None:
    findings = make_findings()
    words = favourite_words(findings, "layer 1")
    # Each of the two tokens takes 7 of the 14 places that were not forced, for 1 of 8 tokens.
    assert words == [("citizens", pytest.approx(8 * 7 / 14), 1)]
    assert favourite_words(findings, "layer 2") == []  # every token draws itself, as it must


def test_busiest_stretch() -> None:
    indices = torch.arange(40)[:, None].repeat(1, 2)
    indices[20:30, 1] = 25
    assert busiest_stretch(indices, 10) == 20


def test_time_lengths() -> None:
    (timing,) = time_lengths([16])
    assert timing.length == 16
    assert all(value > 0 for value in dataclasses.astuple(timing))


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--threads", "0"], ["--seed", "-1"]])
def test_bad_arguments_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([*arguments, "--out", str(tmp_path / "demo")]) == 1
    errors = capsys.readouterr().err
    assert re.fullmatch(r"python -m benchmarks\.learning\.demo: error: .+\n", errors)
    assert not (tmp_path / "demo").exists()


def test_broken_checkpoint_is_one_line_and_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "dense" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"broken")
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 1
    assert str(checkpoint) in capfd.readouterr().err
    assert checkpoint.read_bytes() == b"broken"


@pytest.mark.slow
def test_quick_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.learning.demo", "--quick", "--out", str(tmp_path)]
    root = Path(__file__).parents[2]
    first = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert "majority class" in first.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    again = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    # What was trained is not trained again.
    assert first.stdout.splitlines()[1:4] == again.stdout.splitlines()[1:4]
