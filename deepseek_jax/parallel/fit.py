"""Whether a network and its batches fit a mesh, before anything is compiled."""

from collections.abc import Mapping, Sequence

from deepseek_jax.model.config import GQAConfig, ModelConfig
from deepseek_jax.parallel.mesh import Fits, MeshConfig
from deepseek_jax.parallel.rules import build_rules, shards


def fits(
    config: MeshConfig,
    model: ModelConfig,
    rows: Sequence[tuple[str, int]] = (),
    lengths: Sequence[tuple[str, int]] = (),
) -> Fits:
    """-> a function of a mesh's sizes that says in a sentence what does not fit, or None.

    `rows` and `lengths` are numbers of sequences and of tokens that have to divide evenly, each with the field that it
    comes from.
    """
    rules = dict(build_rules(config.rules))

    def wrong(sizes: Mapping[str, int]) -> str | None:
        heads = model.attention.num_kv_heads if isinstance(model.attention, GQAConfig) else model.attention.num_heads
        divided = [("the attention heads", heads, "heads"), *((field, count, "batch") for field, count in rows)]
        divided += [(field, count, "length") for field, count in lengths]
        if model.moe is not None:
            divided.append(("model.moe.num_experts", model.moe.num_experts, "experts"))
        for what, count, name in divided:
            if count % shards(rules, sizes, name):
                axes = " and ".join(axis for axis in rules[name] if sizes[axis] > 1)
                return f"{axes} of {shards(rules, sizes, name)} in all {'does' if ' and ' not in axes else 'do'} not divide {what}={count}"
        for axis, factor in config.dcn:
            if sizes[axis] % factor:
                return f"dcn.{axis}={factor} does not divide {axis}={sizes[axis]}"
            if (
                axis in rules["experts"]
                and model.moe is not None
                and model.moe.topk_groups < model.moe.num_groups
                and model.moe.num_groups % factor
            ):
                return (
                    f"dcn.{axis}={factor} cuts through the {model.moe.num_groups} expert groups, so that a token would "
                    "cross the slow "
                    f"network to more than topk_groups={model.moe.topk_groups} places"
                )
        return None

    return wrong
