"""Attention of a sequence to itself without the matrix of scores in memory, for heads whose keys and values differ in
width, as MLA's do."""
