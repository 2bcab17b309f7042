"""A small network of V3's shape in FP8 as V3 trains (V3 §3.3, Appendix B.1); the base of
experiments/sweeps/fp8_curve.py.

    python -m deepseek_jax --config=experiments/fp8_curve.py
    python -m deepseek_jax --config=experiments/fp8_curve.py --config.precision.name=bfloat16

The second command trains the network to compare with. It has 2,830,088 parameters and heads as wide as V3's. Hardware:
one CPU core; 8 minutes in FP8, 3.5 in bfloat16. The results are in experiments/sweeps/fp8_curve.py.

The stage `outliers` of this file adds outlier channels, as large networks grow them:
--config.stages="('outliers', 'pretrain')".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from deepseek_jax.model.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from deepseek_jax.model.transformer import Transformer, logical_axes
from deepseek_jax.ranges import above, at_least, check
from deepseek_jax.stages import Stage, Variables


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=272,
        hidden_size=256,
        num_layers=2,
        intermediate_size=512,
        attention=MLAConfig(
            num_heads=2, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=256, num_shared_experts=1, routed_scaling_factor=2.5),
        first_k_dense=1,
        rope=RopeConfig(theta=10_000.0),
        mtp_depth=0,
        init_std=0.03,
    )
    return ConfigDict(
        {
            "model": model.to_dict(),
            "precision": {"name": "fp8_deepseek"},
            "tokenizer": "byte",
            "mesh": {},
            "seed": 0,
            "stages": ("pretrain",),
            "outliers": {"kind": "fp8_curve:OutliersStage", "channels": 4, "factor": 64.0},
            "pretrain": {
                "kind": "pretrain",
                "data": {"sources": ({"name": "stdlib"},)},
                "seq_len": 128,
                "batch_size": 32,
                "train": {
                    "steps": 240,
                    "microbatch": 0,
                    "optimizer": {
                        "learning_rate": {"kind": "cosine", "peak": 2e-4, "warmup_steps": 20},
                        "b1": 0.9,
                        "b2": 0.95,
                        "weight_decay": 0.1,
                        "clip_norm": 1.0,
                        "moment_dtype": "bfloat16",
                    },
                    "objective": {"mtp_weight": 0.0, "balance_alpha": 1e-4},
                    "bias_update_speed": 0.001,
                    "log_every": 1,
                    "eval_every": 0,
                    "eval_batches": 4,
                    "checkpoint_every": 0,
                },
            },
        }
    )


@dataclasses.dataclass(frozen=True)
class OutliersStage(Stage):
    """Puts `channels` outlier channels, `factor` times as large, into the weights; leaves no files."""

    channels: int
    factor: float

    leaves_results: ClassVar[bool] = False

    def __post_init__(self):
        width = self.experiment.model.config.hidden_size
        check(self, "", channels=at_least(1, at_most=width), factor=above(0))

    def summary(self) -> str:
        return f"{self.channels} channels {self.factor:g} times as large"

    def run(self, variables: Variables | None) -> Variables:
        variables = self.initial_weights(variables)
        return {
            **variables,
            "params": add_outliers(self.experiment.model, variables["params"], self.channels, self.factor),
        }


def add_outliers(model: Transformer, params: Mapping[str, Any], channels: int, factor: float) -> dict[str, Any]:
    """Makes `channels` evenly spaced channels of every norm before an attention or a feed-forward `factor` times as
    large, and the rows of the weights that read them as much smaller. For a power of two the network computes the same,
    bit for bit, except where something rounds numbers of one size together."""
    flat = traverse_util.flatten_dict(params, sep="/")
    axes = traverse_util.flatten_dict(dict(logical_axes(model))["params"], sep="/")
    for path in list(flat):
        block, _, norm = path.removesuffix("/scale").rpartition("/")
        if norm in ("attn_norm", "ffn_norm"):
            large = np.arange(channels) * (flat[path].shape[-1] // channels)
            flat[path] = _scaled(flat[path], (..., large), factor)
            for reader in flat:
                # a weight's input axis is its last but one
                if reader.startswith(f"{block}/{norm.removesuffix('_norm')}/") and axes[reader][-2:-1] == ("embed",):
                    flat[reader] = _scaled(flat[reader], (..., large, slice(None)), 1 / factor)
    return traverse_util.unflatten_dict(flat, sep="/")


def _scaled(x: jax.Array, where: tuple, factor: float) -> jax.Array:
    return x.at[where].multiply(factor)
