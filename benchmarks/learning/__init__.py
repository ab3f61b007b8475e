"""What models learn with sampled attention: ``python -m benchmarks.learning --help``.

``tasks`` has the data sets, models and the training loop, ``study`` makes grids of trainings, and
``cli`` is their command. Commands of their own are ``demo``, which trains Smart Bird beside dense
attention and writes a report, and ``estimate``, which measures the error of sampled attention.
"""
