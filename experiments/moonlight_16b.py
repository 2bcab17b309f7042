"""Moonlight-16B-A3B's pre-training at full size, on 5.7T tokens: network, optimizer, batch and schedules of the report
(arXiv 2502.16982, §2.2 and §3.2).

    python -m deepseek_jax --config=experiments/moonlight_16b.py --dry

validates it and prints the plan, allocating nothing: Muon updates 15.29B parameters, AdamW embedding, head and norms.

Hardware: weights, gradients and float32 moments are 194 GB (255 GB with `--config.pretrain.train.optimizer.name=adamw`,
since Muon has one moment and AdamW two): three 80 GB accelerators for the state alone, some hundreds to finish. It has
never been run. Cost: 1.1e23 FLOPs (18.87 GFLOPs a token at 8K): 77,600 GPU-hours, $155,000 at $2 an hour, if each
sustains V3's 385 TFLOP/s. Newton-Schulz adds 0.1% to the FLOPs of a step of 4096 sequences. Differences: the corpus is
not public, so C4 stands in, read with the byte tokenizer until `tokenizer` is the released checkpoint's folder;
Newton-Schulz iterates in float32, Moonlight's published code in bfloat16; norms do not decay. Expected result: MMLU
60.4, BBH 43.2, HumanEval 37.2 at 1.2T tokens, where AdamW reached 60.2, 45.3 and 29.3 (report, Table 4).
"""

from ml_collections import ConfigDict

from deepseek_jax.model.presets import preset
from deepseek_jax.training.schedules import MOONLIGHT_BATCH, MOONLIGHT_TOKENS


def get_config() -> ConfigDict:
    steps = MOONLIGHT_BATCH.step_at(MOONLIGHT_TOKENS)
    config = ConfigDict()
    config.seed = 0
    config.model = preset("moonlight_16b").to_dict()
    config.runtime = {"remat": "full"}
    config.precision = "bfloat16"
    config.tokenizer = "byte"
    config.mesh = {"fsdp": -1, "expert": 8}
    config.stages = ("pretrain",)
    config.pretrain = {
        "kind": "pretrain",
        "seq_len": MOONLIGHT_BATCH.seq_len,
        "batch_size": MOONLIGHT_BATCH.end,
        # As many hosts as 256 share the reading; so many streams mix documents in a batch already, and a host may hold
        # many windows.
        "data": {"sources": [{"name": "tfds:c4/en"}], "streams": 256, "shuffle_window": 64},
        "train": {
            "steps": steps,
            # 2048 sequences for the first 200B tokens, then 4096.
            "batch_size": {
                "kind": "switch",
                "first": float(MOONLIGHT_BATCH.start),
                "second": float(MOONLIGHT_BATCH.end),
                "at": MOONLIGHT_BATCH.ramp_steps / steps,
            },
            "microbatch": 512,
            "optimizer": {
                "name": "muon",
                "muon": {"momentum": 0.95, "update_rms": 0.2, "newton_schulz": "moonlight"},
                "learning_rate": {"kind": "moonlight", "steps": None},
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
            },
            # The released config.json names a sequence-wise loss of 0.001 in addition to the correction bias.
            "objective": {"mtp_weight": 0.0, "balance": "sequence", "balance_alpha": 0.001},
            # γ is 0.001 up to 5.2T tokens and 0 in the cooldown (appendix C).
            "bias_update_speed": {
                "kind": "switch",
                "first": 0.001,
                "second": 0.0,
                "at": MOONLIGHT_BATCH.step_at(5.2e12) / steps,
            },
            "bias_update_zero_sum": True,
            "eval_every": 1000,
            "checkpoint_every": 1000,
        },
    }
    return config
