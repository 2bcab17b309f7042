"""Accounting: parameters, FLOPs, memory and GPU-hours of a network, by closed formulas. Nothing is allocated.

    python -m deepseek_jax.accounting v3_671b

`counts` takes the shapes from the model itself; `flops`, `memory` and `cost` are closed formulas of the config and
those counts.
"""

from deepseek_jax.accounting.counts import ParameterCounts, count_parameters
from deepseek_jax.accounting.flops import decode_flops_per_token, forward_flops_per_token, training_flops_per_token
from deepseek_jax.accounting.memory import cache_bytes_per_token, cache_elements_per_token, training_state_bytes

__all__ = [
    "ParameterCounts",
    "cache_bytes_per_token",
    "cache_elements_per_token",
    "count_parameters",
    "decode_flops_per_token",
    "forward_flops_per_token",
    "training_flops_per_token",
    "training_state_bytes",
]
