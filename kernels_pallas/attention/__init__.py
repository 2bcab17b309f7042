"""Attention of a sequence to itself without the matrix of scores in memory. Keys and values may differ in width, as
MLA's do."""
