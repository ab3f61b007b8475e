"""How fast attention is: ``python -m benchmarks.speed.attention --help``.

``attention`` is the command; ``presets`` says what it measures; ``contenders`` holds Smart Bird and
its rivals, ``layers`` what attention is a part of, ``trained_sketch`` a sketch that has learned;
``timing``, ``memory``, ``stages`` and ``machine`` measure; ``baseline`` times two versions of
smartbird, each in a ``worker``; ``results`` is the JSON, ``ratios`` what it says; and ``report``
makes tables and plots of it. A command of its own is ``roofline``, which counts what the CUDA
kernels do.
"""
