"""What is told of all benchmarks together: tables of README.md and docs/settings.md, and pictures.

All of it is made of the JSON files in ``docs``; ``python -m benchmarks.overview`` makes it anew.
"""
