"""Sweeps: many runs of one experiment, on this machine, on a SLURM cluster or in a cloud.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/….py --launcher=local|slurm|skypilot

`sweep` says what a sweep is, `jobs` checks every run before the first one starts, `execute` runs one and notes how it
ended, `local`, `slurm` and `skypilot` say where; `plan` is the bill beforehand, `results` and `plots` are what comes
back.
"""

from deepseek_jax.launch.ladder import Rung, ladder
from deepseek_jax.launch.resources import Resources
from deepseek_jax.launch.sweep import Run, Sweep, cross, grid, paired_seeds

__all__ = ["Resources", "Run", "Rung", "Sweep", "cross", "grid", "ladder", "paired_seeds"]
