"""Launch: sweeps, many runs of one experiment, on this machine, on a SLURM cluster or in a cloud.

    python -m deepseek_jax.launch --sweep=experiments/sweeps/….py --launcher=local|slurm|skypilot

`sweep` defines a sweep, `jobs` checks every run before the first one starts, `execute` runs one and records how it
ended, `local`, `slurm` and `skypilot` start runs somewhere, `plan` estimates time and cost beforehand, `results` and
`plots` collect what the runs leave.
"""

from deepseek_jax.launch.ladder import Rung, ladder
from deepseek_jax.launch.resources import Resources
from deepseek_jax.launch.sweep import Run, Sweep, cross, grid, paired_seeds

__all__ = ["Resources", "Run", "Rung", "Sweep", "cross", "grid", "ladder", "paired_seeds"]
