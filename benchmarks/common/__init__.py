"""What the benchmarks of speed and of learning have in common: pages, tables, plots and memory."""
