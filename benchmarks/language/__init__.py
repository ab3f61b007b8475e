"""A pretrained causal model with sampled attention beside the same model as it was.

SmolLM2-135M-Instruct reads long real texts: perplexity by keys per query, a planted fact, times,
memory, and how it goes on writing. ``python -m benchmarks.language`` measures and writes the page;
``embeddings``, a part of its own, does so for an encoder.
"""
