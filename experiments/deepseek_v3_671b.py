"""DeepSeek-V3's pre-training at full size: network, optimizer and schedules of the report (V3 §4.2), 14.8T tokens.

    python -m deepseek_jax --config=experiments/deepseek_v3_671b.py --dry
    python -m deepseek_jax.dry_run --config=experiments/deepseek_v3_671b.py --topology=v5p:8x8x16

The first command validates the file and prints the plan; it allocates nothing. The second compiles a step.

Hardware: weights, gradients and bfloat16 moments are 8.2 TB; V3 ran on 2048 H800s. The mesh is for 1,024 devices or
more, a multiple of 64; the microbatch is one sequence for each of 1,024. It has been compiled for v5p:8x8x16 (what it
needs there is in `deepseek_jax/parallel/README.md`) and never run. Cost: 3.9e24 FLOPs with MTP (260.6 GFLOPs a token).
The report's own bill for this stage is 2.664M H800 hours, $5.3M at $2 an hour. Differences: V3 multiplies in FP8,
this file in bfloat16; V3 lets attention cross packed documents, this code masks it; V3's corpus is not public, so C4
stands in, read with the byte tokenizer until `tokenizer` is the released checkpoint's folder. Pre-training has no YaRN;
context extension (V3 §4.3) switches on `rope.yarn` of the preset. Expected result: Pile-test 0.548 bits per byte (V3
Table 3).
"""

from ml_collections import ConfigDict

from deepseek_jax.model.config import RopeConfig
from deepseek_jax.model.presets import preset
from deepseek_jax.training.schedules import V3_BATCH, V3_TOKENS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = preset("v3_671b").replace(rope=RopeConfig()).to_dict()
    config.runtime = {"remat": "full"}
    config.precision = "bfloat16"
    config.tokenizer = "byte"
    config.mesh = {"fsdp": -1, "expert": 64}
    config.stages = ("pretrain",)
    config.pretrain = {
        "kind": "pretrain",
        "seq_len": V3_BATCH.seq_len,
        "batch_size": V3_BATCH.end,
        # As many hosts as 256 share the reading; so many streams mix documents in a batch already, and a host may hold
        # many windows.
        "data": {"sources": [{"name": "tfds:c4/en"}], "streams": 256, "shuffle_window": 64},
        "train": {
            "steps": V3_BATCH.step_at(V3_TOKENS),
            # 3072 -> 15360 sequences over the first 469B tokens, in thirteen sizes: multiples of the microbatch.
            "batch_size": {
                "kind": "ramp",
                "start": V3_BATCH.start,
                "end": V3_BATCH.end,
                "steps": round(V3_BATCH.ramp_steps),
            },
            "microbatch": 1024,
            "optimizer": {
                "learning_rate": {"kind": "deepseek_v3", "steps": None},
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "moment_dtype": "bfloat16",
            },
            "objective": {
                "mtp_weight": {"kind": "deepseek_v3_mtp_weight", "steps": None},
                "balance": "sequence",
                "balance_alpha": 1e-4,
            },
            "bias_update_speed": {"kind": "deepseek_v3_bias_speed", "steps": None},
            "eval_every": 1000,
            "checkpoint_every": 1000,
        },
    }
    return config
