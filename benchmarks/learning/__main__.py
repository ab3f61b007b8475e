"""The command line, or what it needs beside the library."""

import sys


def main() -> int:
    """Runs the command line; returns its exit code, 1 where a package that it needs is missing."""
    try:
        from benchmarks.learning import cli
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("benchmarks", "smartbird")):
            raise
        print(f"error: {error}: pip install '.[bench]'", file=sys.stderr)
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
