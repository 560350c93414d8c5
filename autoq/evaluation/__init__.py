"""Measures models: perplexity, divergence from a reference, speed."""

from __future__ import annotations

from autoq.evaluation.divergence import compare, kl_divergence
from autoq.evaluation.perplexity import perplexity
from autoq.evaluation.speed import measure_generation, model_bytes

__all__ = ["compare", "kl_divergence", "measure_generation", "model_bytes", "perplexity"]
