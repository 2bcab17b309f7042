"""python -m deepseek_jax.accounting v3_671b | FOLDER | --config=experiments/x.py [--config.model.any.field=value]
[--json]

Prints parameters, FLOPs, memory and cost of a published network, of a Hugging Face folder's, or of an experiment with
all its stages. Without an argument it lists the published networks.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from deepseek_jax import cli
from deepseek_jax.accounting.cost import Work
from deepseek_jax.accounting.counts import count_parameters
from deepseek_jax.accounting.report import CostAssumptions, network_report, network_table
from deepseek_jax.errors import ConfigError
from deepseek_jax.experiment import build_experiment, read_config
from deepseek_jax.json_io import to_json
from deepseek_jax.model.config import ModelConfig
from deepseek_jax.model.presets import PRESETS, preset
from deepseek_jax.overrides import plain, split


def main(argv: Sequence[str]) -> None:
    defaults = CostAssumptions()
    parser = cli.parser(
        "deepseek_jax.accounting", "Parameters, FLOPs, memory and cost of a network; nothing is allocated."
    )
    parser.add_argument(
        "preset", nargs="?", help="a published model, or a folder with its config.json; the list is printed without it"
    )
    parser.add_argument("--config", help="an experiment file that is counted instead; --config.field=value overrides")
    parser.add_argument(
        "--seq_len", type=cli.number(int, least=1), default=defaults.seq_len, help="tokens of context for the FLOPs"
    )
    parser.add_argument(
        "--tokens",
        type=cli.number(above=0),
        help="training tokens for the cost (default: those of the experiment's stages, 1e12 without an experiment)",
    )
    parser.add_argument(
        "--sustained_tflops",
        type=cli.number(above=0),
        default=defaults.sustained_tflops,
        help="per GPU, for the cost: V3's own on an H800",
    )
    parser.add_argument(
        "--dollars_per_hour",
        type=cli.number(above=0),
        default=defaults.dollars_per_hour,
        help="per GPU, for the cost: V3's own for an H800",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    overrides, rest = split(argv)
    flags = parser.parse_args(rest)
    if flags.preset and flags.config:
        raise ConfigError(f"both the preset {flags.preset!r} and --config={flags.config} were given: name one of them")
    if not flags.preset and not flags.config:
        list_presets(flags.json)
        return
    assumptions, stages = assumptions_from(flags), {}
    if flags.config:
        name, (config, stages) = flags.config, experiment_work(flags.config, overrides)
    else:
        name, config = flags.preset, named_model(flags.preset)
    figures = network_report(config, assumptions, stages)
    if flags.json:
        print(to_json({"model": name, **figures}, indent=2))
    else:
        cli.show(network_table(name, figures))


def assumptions_from(flags) -> CostAssumptions:
    return CostAssumptions(flags.seq_len, flags.tokens, flags.sustained_tflops, flags.dollars_per_hour)


def named_model(name: str) -> ModelConfig:
    """The config of a published model, or of a Hugging Face folder, of which config.json is enough."""
    if name in PRESETS or not Path(name).is_dir():
        return preset(name)
    from deepseek_jax.interop.hf_config import config_from_hf, read_config

    return config_from_hf(read_config(Path(name)))


def experiment_work(path: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[ModelConfig, dict[str, Work]]:
    """The model of an experiment file and the work of its stages, overrides applied; {} for a file without stages.
    Raises ConfigError where the file or its model can't be read."""
    config, name = read_config(path, overrides), Path(path).stem
    if "model" not in config:
        raise ConfigError(f"{path}: get_config() has no field 'model'; it has {', '.join(sorted(config))}")
    if not config.get("stages"):
        return ModelConfig.from_dict(plain(config)["model"]), {}
    from deepseek_jax.stages import (  # with everything that stages need, which a network alone does not
        build_stages,
        works,
    )

    experiment = build_experiment(config, name, Path("runs") / name, elsewhere=0)
    return experiment.model.config, works(build_stages(experiment))


def list_presets(as_json: bool) -> None:
    counts = {name: count_parameters(build()) for name, build in PRESETS.items()}
    if as_json:
        print(
            to_json(
                {name: {"total": c.total, "activated_with_head": c.activated()} for name, c in counts.items()}, indent=2
            )
        )
        return
    view = Table("preset", "parameters", "activated (with head)", "MTP", box=None)
    for name, c in counts.items():
        view.add_row(name, f"{c.total:,}", f"{c.activated():,}", f"{c.mtp_total:,}")
    cli.show(view)


if __name__ == "__main__":
    cli.run(main)
