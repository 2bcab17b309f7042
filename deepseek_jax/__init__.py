"""DeepSeek-V3 and R1 in JAX, from random weights or a released checkpoint to a reasoning model."""

__version__ = "0.1.0"
