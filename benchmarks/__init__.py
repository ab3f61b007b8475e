"""Benchmarks, run from the root of the source tree: ``python -m benchmarks.attention --help``.

``attention`` is the command; ``presets`` says what it measures; ``contenders`` holds Smart Bird and
its rivals; ``timing``, ``memory``, ``stages`` and ``machine`` measure; ``results`` is the JSON; and
``report`` makes tables and plots of it. ``estimate`` is a command of its own: it
measures errors and no times. So are ``gpu``, which times on a GPU, and ``roofline``, which counts
what the CUDA kernels do.
"""
