"""Quantization: the arithmetic, the AWQ search and the pipeline that applies it to a model."""
