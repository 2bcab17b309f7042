"""DeepSeek-V2-Lite's pre-training at full size: network, optimizer and schedules of the report (V2 appendix B), 5.7T
tokens.

    python -m deepseek_jax --config=experiments/deepseek_v2_lite_16b.py --dry
    python -m deepseek_jax.dry_run --config=experiments/deepseek_v2_lite_16b.py --topology=v6e:4x8 \\
        --config.pretrain.train.microbatch=32

The first command validates the file and prints the plan; it allocates nothing. The second compiles a step.

Hardware: weights, gradients and float32 moments are 251 GB: four 80 GB accelerators for the state alone, some hundreds
to finish. It has been compiled for v6e:4x8 with a microbatch of 32 (see `deepseek_jax/parallel/README.md`) and never
run. Cost: 9.4e22 FLOPs (16.41 GFLOPs a token): 67,500 GPU-hours, $135,000 at $2 an hour, if each sustains V3's 385
TFLOP/s. Differences: the corpus is not public, so C4 stands in, read with the byte tokenizer until `tokenizer` is the
released checkpoint's folder. Pre-training has no YaRN; context extension to 32K switches on `rope.yarn` of the preset.
Expected result: MMLU 58.3, GSM8K 41.1 (V2 Table 6, base model).
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import RopeConfig
from deepseek_jax.model.presets import preset
from deepseek_jax.training.schedules import V2_LITE_BATCH, V2_LITE_TOKENS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = preset("v2_lite_16b").replace(rope=RopeConfig()).to_dict()
    config.runtime = {"remat": "full"}
    config.precision = "bfloat16"
    config.tokenizer = "byte"
    config.mesh = {"fsdp": -1, "expert": 8}
    config.stages = ("pretrain",)
    config.pretrain = {
        "kind": "pretrain",
        "seq_len": V2_LITE_BATCH.seq_len,
        "batch_size": V2_LITE_BATCH.end,
        # As many hosts as 256 share the reading; so many streams mix documents in a batch already, and a host may hold
        # many windows.
        "data": {"sources": [{"name": "tfds:c4/en"}], "streams": 256, "shuffle_window": 64},
        "train": {
            "steps": V2_LITE_BATCH.step_at(V2_LITE_TOKENS),
            "microbatch": 512,
            "optimizer": {
                "learning_rate": {"kind": "deepseek_v2_lite", "steps": None},
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
            },
            "objective": {"mtp_weight": 0.0, "balance": "expert", "balance_alpha": 0.001},
            "bias_update_speed": 0.0,
            "eval_every": 1000,
            "checkpoint_every": 1000,
        },
    }
    return config
