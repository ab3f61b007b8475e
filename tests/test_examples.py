"""The examples run as they stand and do what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_swap_encoder_layers_learns() -> None:
    untrained, trained = map(float, re.findall(r"error (\S+)", run("swap_encoder_layers.py")))
    assert trained < 0.5 * untrained


def test_rotary_gqa_decoder_tells_what_it_has_read() -> None:
    (told,) = re.findall(r"(\S+) % of the second half told", run("rotary_gqa_decoder.py"))
    # By chance, 1 of 64 tokens.
    assert float(told) > 80


def test_finetune_pretrained_learns_and_writes_what_it_trained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    from smartbird import hf

    told = run("finetune_pretrained.py", "--steps", "20", "--length", "64", "--out", str(tmp_path))
    pattern = r"perplexity before (\S+), after (\S+), with dense attention (\S+)"
    before, after, dense = map(float, re.findall(pattern, told)[0])
    # By chance, 256 tokens; the least is 2.
    assert before > 100
    assert after < 8
    assert dense < 8
    model = hf.load(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path)
    assert all(layer.sampled for layer in hf.report(model))


def test_plot_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra smartbird[plot]")
    run("plot_draws.py", str(tmp_path))
    for name in ("arcs.png", "heat_map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
