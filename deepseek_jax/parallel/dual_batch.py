"""Dual batch: two halves of a microbatch run through the same layer side by side (V3 §3.2.1), so that the tokens of one
travel while the other computes."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.model.attention_core import Tokens
from deepseek_jax.model.config import ModelConfig, MoEConfig
from deepseek_jax.model.ops import Ops
from deepseek_jax.model.transformer import Block
from kernels_pallas.trust import say_once


class DualBatchBlock(nn.Module):
    """A block with the same parameters under the same names, called on the even and on the odd sequences of a batch.

    The halves are independent, so that the compiler can overlap the exchange of one with the products of the other.
    With a cache, or where the sequences don't make two halves on every device (which is logged once), it is the block
    itself.
    """

    of: ClassVar[type[nn.Module]] = Block

    config: ModelConfig
    ops: Ops
    moe: MoEConfig | None

    def setup(self):
        self.block = self.of(self.config, self.ops, self.moe)
        nn.share_scope(self, self.block)

    def __call__(self, x_BTD, tokens: Tokens, cache_entry, expert_ids_BTK):
        sequences, halves = x_BTD.shape[0], 2 * self.ops.batch_shards
        if cache_entry is None and sequences % halves:
            say_once(
                f"mesh.dispatch.dual_batch: {sequences} sequences do not make two halves on each of the {halves // 2} "
                "devices that divide them, so each layer runs them in one piece and nothing overlaps; batches and "
                f"microbatches that are multiples of {halves} avoid it"
            )
        if cache_entry is not None or sequences % halves:
            return self.block(x_BTD, tokens, cache_entry, expert_ids_BTK)

        def half(tree, which: int):
            """Sequences which, which + 2, …: a divided batch stays divided."""
            return jax.tree.map(lambda x: x.reshape(sequences // 2, 2, *x.shape[1:])[:, which], tree)

        def whole(even, odd):
            if even.ndim == 0:  # a count, as of overflows
                return even + odd
            return jnp.stack([even, odd], axis=1).reshape(sequences, *even.shape[1:])

        halves = [self.block(*half((x_BTD, tokens), which), None, half(expert_ids_BTK, which)) for which in (0, 1)]
        return jax.tree.map(whole, *halves)


@functools.cache
def dual_batch_block(block: type[nn.Module]) -> type[DualBatchBlock]:
    """`DualBatchBlock` of any block that is made and called as `Block` is, one's own too."""
    return DualBatchBlock if block is Block else type(f"DualBatch{block.__name__}", (DualBatchBlock,), {"of": block})
