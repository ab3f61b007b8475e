"""Smart Bird beside dense attention on real text: `python -m benchmarks.learning.demo`."""
