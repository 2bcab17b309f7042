"""python -m deepseek_jax.accounting v3_671b | --config=experiments/x.py [--config.model.any.field=value] [--json]

What a network costs; without a network, the published ones in a list.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from deepseek_jax import cli
from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.accounting.report import Assumptions, report, table
from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import read_flags
from deepseek_jax.json_io import to_json
from deepseek_jax.model.config import PRESETS, ModelConfig, preset


def main(argv: Sequence[str]) -> None:
    defaults = Assumptions()
    parser = cli.parser("deepseek_jax.accounting", "Parameters, FLOPs, memory and cost of a network; nothing is allocated.")
    parser.add_argument("preset", nargs="?", help="a published model; the list is printed without it")
    parser.add_argument("--config", help="an experiment file whose model is counted instead; --config.field=value overrides")
    parser.add_argument("--sequence_length", type=int, default=defaults.sequence_length, help="tokens of context for the FLOPs")
    parser.add_argument("--tokens", type=float, default=defaults.tokens, help="training tokens for the cost")
    parser.add_argument("--sustained_tflops", type=float, default=defaults.sustained_tflops, help="per GPU, for the cost")
    parser.add_argument("--dollars_per_hour", type=float, default=defaults.dollars_per_hour, help="per GPU, for the cost")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    flags = parser.parse_args([argument for argument in argv if argument not in overrides])
    if flags.preset and flags.config:
        raise ConfigError(f"both the preset {flags.preset!r} and --config={flags.config} were given: name one of them")
    if not flags.preset and not flags.config:
        list_presets(flags.json)
        return
    if flags.config:
        name, config = flags.config, experiment_model([f"--config={flags.config}", *overrides])
    else:
        name, config = flags.preset, preset(flags.preset)
    figures = report(config, assumptions_from(flags))
    if flags.json:
        print(to_json({"model": name, **figures}, indent=2))
    else:
        Console(width=100).print(table(name, figures))


def assumptions_from(flags) -> Assumptions:
    for field in ("sequence_length", "tokens", "sustained_tflops", "dollars_per_hour"):
        if getattr(flags, field) <= 0:
            raise ConfigError(f"--{field}={getattr(flags, field)}: must be above 0")
    return Assumptions(flags.sequence_length, flags.tokens, flags.sustained_tflops, flags.dollars_per_hour)


def experiment_model(arguments: Sequence[str]) -> ModelConfig:
    """The model of an experiment file, overrides applied. Raises ConfigError where the file or its model can't be read."""
    config = read_flags(arguments)[0]
    if "model" not in config:
        raise ConfigError(f"{arguments[0]}: get_config() has no field 'model'; it has {', '.join(sorted(config))}")
    return ModelConfig.from_dict(config.model.to_dict())


def list_presets(as_json: bool) -> None:
    counts = {name: count_parameters(build()) for name, build in PRESETS.items()}
    if as_json:
        print(to_json({name: {"total": c.total, "activated_with_head": c.activated()} for name, c in counts.items()}, indent=2))
        return
    view = Table("preset", "parameters", "activated (with head)", "MTP", box=None)
    for name, c in counts.items():
        view.add_row(name, f"{c.total:,}", f"{c.activated():,}", f"{c.mtp_total:,}")
    Console(width=100).print(view)


if __name__ == "__main__":
    cli.run(main)
