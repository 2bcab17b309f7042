"""Shared by the tests of launching: a sweep over a small experiment, and a stand-in for `python -m deepseek_jax`."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from deepseek_jax.launch import Resources, Run
from deepseek_jax.launch.jobs import Job

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "experiments" / "v3_style_tiny.py")

# Does what the run's name says, in the folder that --workdir names. "slow" waits to be told to stop, saves, and is
# quick the next time.
STAND_IN = r"""
import os, pathlib, signal, sys, time
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).removeprefix("--workdir="))
with (folder / "starts").open("a") as file:
    file.write(f"{time.time()} {os.environ.get('SLOT', '')}\n")
if hasattr(os, "sched_getaffinity"):
    (folder / "cores").write_text(" ".join(map(str, sorted(os.sched_getaffinity(0)))))
print("argument:", sys.argv[-1])
if folder.name.startswith("bad"):
    print("the reason why"); sys.exit(3)
if folder.name.startswith("slow") and not (folder / "saved").exists():
    def save(*_):
        (folder / "saved").touch(); sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    (folder / "ready").touch()
    time.sleep(60)
if folder.name.startswith("while"):
    for step in range(7):
        print(f"pretrain {step}/7  loss 2.5  {step} s, {7 - step} s left", flush=True)
        time.sleep(0.1)
(folder / "ends").write_text(str(time.time()))
"""


def stand_in(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    return sys.executable, str(path)


def jobs_of(folder: Path, *names: str, overrides=None, resources=Resources()) -> list[Job]:
    runs = [Run(name, overrides or {"seed": i}, resources) for i, name in enumerate(names)]
    return [
        Job(run, folder / run.name, "experiment.py", ConfigDict({"seed": 0}), ("pretrain",), 1000, 1e9) for run in runs
    ]
