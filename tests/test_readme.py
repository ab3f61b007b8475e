"""The examples in README.md run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES, ids=["function", "layer", "record"])
def test_example_runs(example: str) -> None:
    exec(compile(example, str(README), "exec"), {})
