"""The dry-run tests' cases: experiments, topologies, and the figures of a report that are the same on every machine.

python tests/dry_run/dry_run_cases.py [CASE …]  compiles them (default: all but the small) into golden/CASE.json
pytest tests/dry_run -m big_dry_run             compiles the big ones again and compares
"""

import json
import pathlib
import sys

from deepseek_jax.dry_run.dry_run import dry_run
from deepseek_jax.experiment import read_flags

MACHINE_DEPENDENT = ("compile_seconds", "peak_host_bytes")  # figures that differ between machines
GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parents[2]
V3 = f"--config={ROOT}/experiments/deepseek_v3_671b.py"
# name: (topology, arguments) or (topology, arguments, options of `dry_run`)
BIG = {
    "v3_v5p": ("v5p:8x8x16", (V3,)),
    "v3_tpu7x": ("tpu7x:4x8x8", (V3, "--config.pretrain.train.microbatch=512")),
    "v3_h100": ("h100:2048", (V3, "--config.mesh.tensor=2")),
    "v3_128k_v5p": ("v5p:8x8x16", (f"--config={ROOT}/experiments/deepseek_v3_128k.py",)),
    "v2_lite_v6e": (
        "v6e:4x8",
        (f"--config={ROOT}/experiments/deepseek_v2_lite_16b.py", "--config.pretrain.train.microbatch=32"),
    ),
}
# One MoE layer of V3's shape: a TPU compiler takes tens of seconds for each layer that is written out.
ONE_LAYER = (
    V3,
    "--config.model.num_layers=1",
    "--config.model.first_k_dense=0",
    "--config.model.mtp_depth=0",
    "--config.model.hidden_size=512",
    "--config.model.vocab_size=2048",
    "--config.model.attention.num_heads=8",
    "--config.model.attention.q_lora_rank=256",
    "--config.model.attention.kv_lora_rank=128",
    "--config.model.moe.num_experts=32",
    "--config.model.moe.intermediate_size=256",
    "--config.pretrain.seq_len=512",
    "--config.pretrain.batch_size=8",
    "--config.pretrain.train.batch_size=None",
    "--config.pretrain.train.microbatch=8",
    "--config.mesh.fsdp=2",
    "--config.mesh.expert=4",
)
SMALL = {
    f"small_{name.partition(':')[0]}": (name, ONE_LAYER)
    for name in ("v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1", "h100:8")
}
SMALL |= {
    f"small_decode_{name.partition(':')[0]}": (name, ONE_LAYER, {"program": "decode", "context": 512})
    for name in ("v5p:2x2x2", "h100:8")
}
CASES = BIG | SMALL


def figures(case: str) -> dict:
    """The report of a case without what depends on the machine that compiles."""
    topology, arguments, *options = CASES[case]
    config, name, *_ = read_flags(arguments)
    report = dry_run(config, name, topology, **dict(*options))
    return {key: value for key, value in report.items() if key not in MACHINE_DEPENDENT}


def write(case: str, report: dict) -> None:
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{case}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    for case in sys.argv[1:] or BIG:
        write(case, figures(case))
        print(case, flush=True)
