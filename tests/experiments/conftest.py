"""Experiment files as modules: a test of experiments/ablations/x.py says `import x`, as its config's names do."""

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path += [str(EXPERIMENTS), str(EXPERIMENTS / "ablations")]
