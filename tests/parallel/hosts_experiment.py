"""An experiment that a test runs in one process and in two: a network that compiles in seconds, on eight devices.

The mesh has one axis. With several, two CPU processes may start collectives over different axes in different orders and
wait for each other for ever (jaxlib 0.10.2 with Gloo).

The data comes from $HOSTS_TEST_DATA, a file of JSON lines.
"""

import os

from ml_collections import ConfigDict

from deepseek_jax.model.config import GQAConfig, ModelConfig, MoEConfig


def get_config() -> ConfigDict:
    model = ModelConfig(
        vocab_size=272,
        hidden_size=16,
        num_layers=1,
        intermediate_size=16,
        attention=GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=8),
        init_std=0.1,
    )
    return ConfigDict(
        {
            "model": model.to_dict(),
            "mesh": {"fsdp": 8},
            "stages": ("pretrain",),
            "pretrain": {
                "kind": "pretrain",
                "train": {
                    "steps": 60,
                    "log_every": 1,
                    "eval_every": 20,
                    "checkpoint_every": 5,
                    "optimizer": {"learning_rate": 0.02},
                },
                "data": {"sources": ({"name": os.environ["HOSTS_TEST_DATA"], "validation_fraction": 0.1},)},
                "seq_len": 16,
                "batch_size": 8,
            },
        }
    )
