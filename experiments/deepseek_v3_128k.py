"""DeepSeek-V3's second context extension, 32K to 128K (V3 §4.3): 1000 steps of 480 sequences of 131,072 tokens at
7.3e-6.

    python -m deepseek_jax --config=experiments/deepseek_v3_128k.py --dry
    python -m deepseek_jax.dry_run --config=experiments/deepseek_v3_128k.py --topology=v5p:8x8x16

Hardware: every sequence is divided among 32 devices, every expert layer among 32; 1,024 devices take 32 sequences at a
time. The table in `deepseek_jax/parallel/README.md` says how much memory and time it needs on a v5p pod; it has not
been run. No stage loads the weights of the 32K phase yet: the file defines the program, its batches and its mesh.
"""

from deepseek_v3_671b import get_config as deepseek_v3
from ml_collections import ConfigDict

from deepseek_jax.model.presets import preset


def get_config() -> ConfigDict:
    config = deepseek_v3()
    config.model = preset("v3_671b").to_dict()
    config.runtime = {"remat": "full", "attention_heads_at_once": 16, "attention_chunk": 256}
    config.mesh = {"expert": 32, "context": -1}
    config.pretrain.seq_len = 131_072
    config.pretrain.batch_size = 480
    config.pretrain.data.streams = 32
    train = config.pretrain.train
    with train.ignore_type():  # schedules become numbers
        train.steps, train.microbatch, train.batch_size = 1000, 32, None
        train.optimizer.learning_rate = 7.3e-6
        train.objective.mtp_weight = 0.1
        train.bias_update_speed = 0.0
    return config
