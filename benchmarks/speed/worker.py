"""A process that times cases with the smartbird of one directory: ``benchmarks.speed.baseline``.

It is given the directory, reads one request per line as JSON, and answers each by one line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    # Answers go where output went; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Before smartbird is first imported: that of this checkout stands in the path, too.
    sys.path.insert(0, str(root))
    import smartbird

    if not Path(smartbird.__file__).resolve().is_relative_to(root):
        sys.exit(f"error: smartbird was not taken from {root}")
    from benchmarks.speed.contenders import Widths
    from benchmarks.speed.results import case_of
    from benchmarks.speed.timing import time_case

    def answer(message: Any) -> None:
        answers.write(f"{json.dumps(message)}\n")
        answers.flush()

    answer(smartbird.build_info())
    for line in sys.stdin:
        request = json.loads(line)
        timings = time_case(
            case_of(request["case"]),
            [(attention, dtype) for attention, dtype in request["contenders"]],
            Widths(**request["widths"]),
            request["seconds"],
        )
        answer([dataclasses.asdict(timing) for timing in timings])


if __name__ == "__main__":
    main()
