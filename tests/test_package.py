"""What is handed out: the source distribution holds what is in the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# For those who work on it alone.
LEFT_OUT = (".ci/", ".gitignore", ".pre-commit-config.yaml", ".clang-format", ".clang-tidy")


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    if listing.returncode or not listing.stdout:
        pytest.skip("needs git, and a repository")
    tracked = [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    build = "from setuptools.build_meta import build_sdist; build_sdist('out')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (archive,) = (tree / "out").iterdir()
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    missing = [name for name in tracked if name not in names and not name.startswith(LEFT_OUT)]
    assert not missing
