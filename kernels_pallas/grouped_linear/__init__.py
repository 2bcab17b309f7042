"""A Linear for each group of rows, in bfloat16: the experts of a mixture where nothing is quantized."""
