"""Two microbatches through the same layer side by side (V3 §3.2.1): while the tokens of one travel, the other computes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.attention import Tokens
from deepseek_jax.model.config import ModelConfig, MoEConfig
from deepseek_jax.model.placement import Placement
from deepseek_jax.model.transformer import Block
from deepseek_jax.precision import Recipe


class TwoMicrobatches(nn.Module):
    """A `Block` with the same parameters under the same names, called on the even and on the odd rows of a batch.

    Neither half needs anything of the other, so that the compiler can run the exchange of one beside the products of the
    other. Called with a cache, or with rows that don't make two halves on every device, it is the block itself.
    """

    config: ModelConfig
    moe: MoEConfig | None
    precision: Recipe
    placement: Placement

    def setup(self):
        self.block = Block(self.config, self.moe, self.precision, self.placement)
        nn.share_scope(self, self.block)

    def __call__(self, x_BTD, tokens: Tokens, cache_entry, expert_ids_BTK):
        rows = x_BTD.shape[0]
        if cache_entry is not None or rows % (2 * self.placement.batch_shards):
            return self.block(x_BTD, tokens, cache_entry, expert_ids_BTK)

        def half(tree, which: int):
            """Rows which, which + 2, …: a divided batch stays divided."""
            return jax.tree.map(lambda x: x.reshape(rows // 2, 2, *x.shape[1:])[:, which], tree)

        def whole(even, odd):
            if even.ndim == 0:  # overflows
                return even + odd
            return jnp.stack([even, odd], axis=1).reshape(rows, *even.shape[1:])

        halves = [self.block(*half((x_BTD, tokens), which), None, half(expert_ids_BTK, which)) for which in (0, 1)]
        return jax.tree.map(whole, *halves)
