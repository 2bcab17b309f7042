"""python -m deepseek_jax.dry_run --config=experiments/x.py --topology=v5p:8x8x16 [--program=train|decode|grpo]
[--config.any.field=value]

Compiles the real program for hardware that is not there, and prints its memory, its traffic, and lower bounds of its
time and cost. Nothing is allocated and nothing runs; a host without accelerators is enough.
"""

from collections.abc import Sequence
from pathlib import Path

import jax

from deepseek_jax import cli
from deepseek_jax.atomic import atomic_write
from deepseek_jax.dry_run.dry_run import dry_run
from deepseek_jax.dry_run.programs import PROGRAMS
from deepseek_jax.dry_run.table import dry_run_table
from deepseek_jax.dry_run.topologies import prepare
from deepseek_jax.experiment import read_config
from deepseek_jax.json_io import to_json
from deepseek_jax.overrides import split


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(
        "deepseek_jax.dry_run",
        "Compiles an experiment's program for a topology that is not there and reports what it needs.",
    )
    parser.add_argument("--config", required=True, help="an experiment file; --config.field=value overrides")
    parser.add_argument(
        "--topology", required=True, help="v5p:8x8x16, tpu7x:4x4x8, v6e:16x16*2 (two slices), h100:64, …"
    )
    parser.add_argument("--program", default="train", help=", ".join(PROGRAMS))
    parser.add_argument("--stage", help="which of the experiment's stages (default: the first that fits the program)")
    cli.add_price(parser)
    parser.add_argument(
        "--sequences",
        type=cli.number(int, least=1),
        help="sequences that --program=decode decodes at once (default: 8 a device)",
    )
    parser.add_argument(
        "--context", type=cli.number(int, least=2), help="tokens in the cache of --program=decode (default: 4096)"
    )
    parser.add_argument("--json", nargs="?", const="-", help="print JSON, or write it to a file")
    overrides, rest = split(argv)
    flags = parser.parse_args(rest)
    prepare()
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here has no part in it
    config, name = read_config(flags.config, overrides), Path(flags.config).stem
    options = {
        name: value for name, value in (("sequences", flags.sequences), ("context", flags.context)) if value is not None
    }
    figures = dry_run(
        config,
        name,
        flags.topology,
        stage=flags.stage,
        program=flags.program,
        dollars_per_chip_hour=flags.dollars_per_chip_hour,
        **options,
    )
    if flags.json == "-":
        print(to_json(figures, indent=2))
        return
    cli.show(dry_run_table(figures))
    if flags.json:
        atomic_write(Path(flags.json), to_json(figures, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
