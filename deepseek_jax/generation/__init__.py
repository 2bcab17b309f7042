"""Generation: sampling, prefill and cached decoding in one program, streaming and chat.

`python -m deepseek_jax.generation --checkpoint=… --prompt=…` prints a completion as it is made.
"""

from deepseek_jax.generation.generate import Generation, generate
from deepseek_jax.generation.sampling import SamplingConfig

__all__ = ["Generation", "SamplingConfig", "generate"]
