"""A check of a GPU that is lent for minutes: ``python -m benchmarks.gpu --help``.

``__main__`` is the run, part by part; ``measure`` times, in a process of its own that may fall;
``report`` keeps what was found, as JSON and as a table, and says what of it belongs into docs.
"""
