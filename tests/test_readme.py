"""The examples in README.md run as they stand, and a type checker accepts them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
NAMES = ["function", "packed", "layer", "pretrained", "record"]


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_example_runs(example: str) -> None:
    if "transformers" in example:
        pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    exec(compile(example, str(README), "exec"), {})


def test_examples_are_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="the type checker is not installed")
    files = [tmp_path / f"{name}.py" for name in NAMES]
    for file, example in zip(files, EXAMPLES, strict=True):
        file.write_text(example)
    command = [sys.executable, "-m", "mypy", "--config-file=pyproject.toml"]  # which is strict
    result = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
