"""How fast attention is: ``python -m benchmarks.speed.attention --help``.

``attention`` is the command; ``presets`` says what it measures; ``contenders`` holds Smart Bird and
its rivals; ``timing``, ``memory``, ``stages`` and ``machine`` measure; ``results`` is the JSON; and
``report`` makes tables and plots of it. Commands of their own are ``gpu``, which times on a GPU,
and ``roofline``, which counts what the CUDA kernels do.
"""
