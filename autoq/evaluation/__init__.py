"""Evaluation: perplexity, divergence from the full-precision model, and speed."""
