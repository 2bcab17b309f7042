"""FLOPs per token. A multiply-add is two; elementwise work, norms and the softmax are not counted."""

import itertools

from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, seq_len: int = 4096, *, mtp: bool = False) -> int:
    """Mean forward FLOPs per token of a causal sequence; what a query attends to, the attention's config says.

    Two per activated parameter, the input embedding excluded (it is a look-up). `mtp` adds the MTP modules with their
    products by the shared head.
    """
    counts = count_parameters(config)
    weights, layers = counts.activated(), config.num_layers
    if mtp:
        weights += counts.mtp_activated + config.mtp_depth * counts.head_product
        layers += config.mtp_depth
    return 2 * weights + int(layers * config.attention.pair_flops * config.attention.mean_keys(seq_len))


def training_flops_per_token(config: ModelConfig, seq_len: int = 4096, *, mtp: bool = False) -> int:
    """Forward and backward: three times the forward pass, recomputation not counted.

    At 4096 tokens this gives the figures of "Insights into DeepSeek-V3" (Table 2): 250 GFLOPs for V3, 155 for V2.
    """
    return 3 * forward_flops_per_token(config, seq_len, mtp=mtp)


def decode_flops_per_token(config: ModelConfig, context: int) -> int:
    """FLOPs to decode one token with `context` tokens in the cache: absorbed MLA.

    Absorption moves kv_b from the keys and values to the query and the output; it is still used once per token.
    """
    attention = config.num_layers * config.attention.cached_pair_flops * config.attention.cached_keys(context)
    return 2 * count_parameters(config).activated() + attention


def rollout_flops(
    config: ModelConfig,
    *,
    completions: int,
    group_size: int,
    prompt_length: int,
    completion_length: int,
    passes: int,
    oversampling: int = 1,
) -> float:
    """FLOPs of a rollout of `completions` completions with its updates, every prompt and completion at full length.

    `passes` counts passes over the whole sequences: three for each epoch of updates (forward and backward), a fourth
    where a reference policy reads them too. `oversampling` times the completions are drawn (0: the updates alone); each
    prompt is read once for its group.
    """
    length, drawn = prompt_length + completion_length, completions * oversampling
    flops = passes * completions * length * forward_flops_per_token(config, length)
    flops += drawn * _decode_flops(config, prompt_length, length)
    flops += drawn // group_size * prompt_length * forward_flops_per_token(config, prompt_length)
    return float(flops)


def _decode_flops(config: ModelConfig, first: int, end: int, spans: int = 1024) -> int:
    """FLOPs to decode the tokens with `first` to `end` - 1 others in the cache, one after another.

    In at most `spans` spans, each at the mean of its first and last token: exact where the cost is linear inside every
    span, as it is for full attention, and as fast for a million million tokens as for a thousand.
    """
    count = end - first
    spans = max(1, min(spans, count))
    edges = [first + i * count // spans for i in range(spans + 1)]
    total = 0
    for begin, stop in itertools.pairwise(edges):
        ends = decode_flops_per_token(config, begin) + decode_flops_per_token(config, stop - 1)
        total += (stop - begin) * ends // 2
    return total
