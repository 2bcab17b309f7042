"""Resources of a run, and the names that SLURM and the clouds have for them."""

import dataclasses
import math
import re
from typing import Any

from deepseek_jax.errors import ConfigError, nearest
from deepseek_jax.ranges import above, check

# TPU generation: its name at SkyPilot, what that name counts for each chip (cores, or chips), Google's machine image;
# None: not offered.
TPUS = {
    "v4": ("tpu-v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("tpu-v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("tpu-v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("tpu-v6e", 1, "v2-alpha-tpuv6e"),
    "tpu7x": None,
}
GPUS = ("h100", "h200", "h800", "b200")


@dataclasses.dataclass(frozen=True)
class Resources:
    """The machine of a run.

    `topology` is "cpu", a TPU slice such as "v5p:4x4x4" (chips along each axis; "v6e:16x16*2" are two slices) or a
    number of GPUs such as "h100:64".

    `hours` limits one SLURM job; a longer run is requeued and resumes from its checkpoint. `spot` asks a cloud for
    machines that it may take back, at about a third of the price: the run then resumes on others.
    """

    topology: str = "cpu"
    hours: float = 24.0
    spot: bool = True
    gpus_per_node: int = 8

    def __post_init__(self):
        kind, _, shape = self.topology.partition(":")
        if kind not in ("cpu", *TPUS, *GPUS):
            raise ConfigError(
                f"topology={self.topology!r}: {nearest(kind, ('cpu', *TPUS, *GPUS))}, for example 'cpu', 'v5p:4x4x4', "
                "'h100:64'"
            )
        if kind == "cpu" and shape:
            raise ConfigError(f"topology={self.topology!r}: 'cpu' is one machine and takes no shape")
        if kind != "cpu" and not re.fullmatch(
            r"[1-9]\d*" if kind in GPUS else r"[1-9]\d*(x[1-9]\d*)+(\*[1-9]\d*)?", shape
        ):
            raise ConfigError(
                f"topology={self.topology!r}: after the colon come sizes, for example 'v5p:4x4x4' or 'v6e:16x16*2', or "
                "a number of GPUs"
            )
        check(self, "", hours=above(0))
        if kind in GPUS and self.num_devices > self.gpus_per_node and self.num_devices % self.gpus_per_node:
            raise ConfigError(
                f"topology={self.topology!r}: {self.num_devices} GPUs is not a multiple of the node's "
                f"{self.gpus_per_node}"
            )

    @property
    def kind(self) -> str:
        """ "cpu", or the generation: "v5p", "h100"."""
        return self.topology.partition(":")[0]

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS

    @property
    def num_devices(self) -> int:
        """Chips or GPUs; 1 on a CPU."""
        return math.prod(int(size) for size in re.findall(r"\d+", self.topology.partition(":")[2]))

    @property
    def num_nodes(self) -> int:
        """Machines to ask for. A TPU slice counts as one, for any number of hosts."""
        return math.ceil(self.num_devices / self.gpus_per_node) if self.is_gpu else 1

    @property
    def gpus_on_a_node(self) -> int:
        return min(self.num_devices, self.gpus_per_node) if self.is_gpu else 0

    @property
    def accelerators(self) -> str | None:
        """SkyPilot's name for one node: "tpu-v5p-128", "H100:8"; None on a CPU. Raises ConfigError for a topology that
        SkyPilot does not offer."""
        if self.kind == "cpu":
            return None
        if self.is_gpu:
            return f"{self.kind.upper()}:{self.gpus_on_a_node}"
        if "*" in self.topology:
            raise ConfigError(
                f"topology={self.topology!r}: SkyPilot starts one slice for a run, not several that work together"
            )
        if TPUS[self.kind] is None:
            raise ConfigError(
                f"topology={self.topology!r}: SkyPilot does not offer {self.kind}; it offers "
                f"{', '.join(t for t in TPUS if TPUS[t])}"
            )
        name, per_chip, _ = TPUS[self.kind]
        return f"{name}-{per_chip * self.num_devices}"

    @property
    def runtime_version(self) -> str | None:
        """The machine image of a TPU's hosts; None without a TPU."""
        tpu = TPUS.get(self.kind)
        return tpu[2] if tpu else None


def job_parameters(resources: Resources, cluster: str = "slurm") -> dict[str, Any]:
    """submitit's parameters for a run. Raises ConfigError for a TPU slice, which SLURM cannot provide."""
    if resources.kind != "cpu" and not resources.is_gpu:
        raise ConfigError(
            f"topology={resources.topology!r} is not offered by SLURM: use 'cpu', GPUs such as 'h100:64', or "
            "--launcher=skypilot"
        )
    parameters = {"nodes": resources.num_nodes, "tasks_per_node": 1, "timeout_min": round(resources.hours * 60)}
    if resources.is_gpu:
        parameters["gpus_per_node"] = resources.gpus_on_a_node
    if cluster == "slurm":
        parameters |= {"slurm_signal_delay_s": 300, "slurm_additional_parameters": {"requeue": True}}
    return parameters
