"""Checks and speed of the kernels on DeepSeek-V3's shapes."""
