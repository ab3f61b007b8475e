"""What context parallelism costs on this machine, and what it would on more: a model.

See docs/distributed.md.
"""
