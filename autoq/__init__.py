"""autoq: AWQ quantization of Hugging Face causal language models, and fast inference with the result."""

from __future__ import annotations

from autoq._version import __version__
from autoq.auto import AutoQForCausalLM
from autoq.config import QuantConfig

__all__ = ["AutoQForCausalLM", "QuantConfig", "__version__"]
