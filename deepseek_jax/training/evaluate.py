"""Held-out loss in a unit that does not depend on the tokenizer: bits per byte of text."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import DataError
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.arrays import global_batch
from deepseek_jax.training.batches import check_tokens
from deepseek_jax.training.log_probs import token_log_probs
from deepseek_jax.training.targets import targets

Evaluate = Callable[[Mapping[str, Any], Iterable[Mapping[str, np.ndarray]]], dict[str, float]]


def make_evaluate(model: Transformer, chunk: int = 4096, max_batches: int | None = None) -> Evaluate:
    """-> evaluate(variables, batches) -> {"bits_per_byte", "held_out_loss" (nats per target)}.

    Sums over all targets of all batches, or of the first `max_batches`. Besides the fields that training takes, a batch
    has `num_bytes` [B]: the bytes of text behind a sequence's targets. Raises DataError if there is nothing to predict.
    """

    @jax.jit
    def sums(variables, batch):
        output = model.apply(
            variables, batch["tokens"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"]
        )
        targets_BT, mask_BT = targets(batch, 1)
        logp_BT, _ = token_log_probs(model, variables, output.hidden_BTD, targets_BT, chunk)
        return -jnp.sum(logp_BT * mask_BT), jnp.sum(mask_BT), jnp.sum(batch["num_bytes"])

    def evaluate(variables, batches):
        of_batches = []
        for batch in itertools.islice(batches, max_batches):
            check_tokens(batch["tokens"], model.config.vocab_size)
            of_batches.append(sums(variables, global_batch(model.ops, batch)))
        nats, count, num_bytes = (math.fsum(float(batch[i]) for batch in of_batches) for i in range(3))
        if not num_bytes or not count:
            raise DataError("the held-out batches hold no text to predict: give longer documents or more of them")
        return {"bits_per_byte": nats / math.log(2) / num_bytes, "held_out_loss": nats / count}

    return evaluate
