"""Hosts: several processes as one run. They find each other, process 0 writes, and all end when one is lost.

With one process, every function here is the identity or does nothing.

Several CPU processes talk through Gloo, which is for trying things out: give their mesh one axis. With more axes,
collectives run concurrently in no fixed order, and the processes can deadlock (jaxlib 0.10.2).
"""

import ctypes
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax import cli
from deepseek_jax.atomic import atomic_write
from deepseek_jax.errors import ConfigError
from deepseek_jax.parallel import clusters
from deepseek_jax.ranges import at_least, check

CONNECT_SECONDS = 300  # how long the first process waits for the last one to start
HEARTBEAT_SECONDS = 30  # a process that has not been heard of for so long is lost
SHUTDOWN_SECONDS = 60  # how long a process that ends waits for the others to end
LOST = 75  # exit status when another process is lost: EX_TEMPFAIL of sysexits.h, start again


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Process `process_id` of `num_processes`; process 0 listens at `coordinator`, HOST:PORT, the same on all.

    `local_device_ids` are the devices of its machine that belong to this process; None: all of them.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--coordinator={self.coordinator}: give HOST:PORT, the address of process 0 and a free port there"
            )
        check(self, "--", num_processes=at_least(1))
        check(self, "--", process_id=at_least(0, below=self.num_processes, why="the hosts count from 0"))


def split_flags(argv: Sequence[str]) -> tuple[Hosts | None, list[str]]:
    """-> (the hosts that --coordinator, --num_processes and --process_id name, None without them; the other
    arguments)."""
    parser = cli.Parser(prog="python -m deepseek_jax", add_help=False, allow_abbrev=False)
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=cli.number(int, least=1))
    parser.add_argument("--process_id", type=cli.number(int, least=0))
    given, rest = parser.parse_known_args(argv)
    missing = [f"--{name}" for name, value in vars(given).items() if value is None]
    if len(missing) == len(vars(given)):
        return None, rest
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id go together, all three "
            "or none"
        )
    return Hosts(**vars(given)), rest


def detect(environment: Mapping[str, str] = os.environ) -> Hosts | None:
    """The hosts that SLURM, Open MPI, GKE or a Cloud TPU's metadata name; None for a single process.

    A shell inside a SLURM job inherits the job's number of tasks without being one of them, so the step's number
    counts. Processes that share a machine get one device each, in order, unless the launcher has already given each its
    own.
    """
    found = clusters.find(environment, CONNECT_SECONDS)
    if found is None or found.num_processes == 1:
        return None
    own = len(environment.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1
    host, port = (
        f"[{found.host}]" if ":" in found.host else found.host,
        environment.get("JAX_COORDINATOR_PORT", found.port),
    )
    devices = (found.local_id,) if found.local_id is not None and found.sharing and not own else None
    return Hosts(f"{host}:{port}", found.num_processes, found.process_id, devices)


def join(hosts: Hosts | None, saved: Callable[[], str] = lambda: "") -> None:
    """Connects this process with the others, before anything asks jax for a device. One process does nothing.

    From here on only process 0 prints to stdout. A process that is killed ends all others within a minute, with exit
    status `LOST` and a message that ends in `saved()`, which says what can be resumed. SIGTERM is left to jax, see
    `training.preemption`. Raises ConfigError if the others have not connected within CONNECT_SECONDS.
    """
    if hosts is None or hosts.num_processes == 1:
        return
    me = f"process {hosts.process_id} of {hosts.num_processes}"
    alone = (
        f"{me} could not join the others at {hosts.coordinator} within {CONNECT_SECONDS} s: start all of them with the "
        "same --coordinator, "
        "a free port of process 0's machine that the others can reach"
    )
    _explain_abort(lambda: alone, status=2)
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            local_device_ids=hosts.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"{alone} ({str(error).splitlines()[0]})") from error
    lost = (
        f"{me} stops because another process of this run was killed, failed or cannot be reached; the lines above name "
        "it"
    )
    _explain_abort(lambda: f"{lost}. {saved()} Start all {hosts.num_processes} processes again to resume.", status=LOST)
    if not is_primary():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for the rest of the process


def is_primary() -> bool:
    """True in the process that writes files and prints."""
    return jax.process_index() == 0


def from_primary(text: str) -> str:
    """Process 0's text on every process. All must call; the others' arguments are ignored."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return bytes(multihost_utils.broadcast_one_to_all(np.resize(data, size))).decode()


def all_true(here: bool) -> bool:
    """True if the argument is true on every process. All must call."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))


def wait_for_all(where: str) -> None:
    """Returns when every process has called it."""
    multihost_utils.sync_global_devices(where)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file, complete or not at all, from process 0 alone; its folder is made if needed."""
    if is_primary():
        atomic_write(path, text)


def _explain_abort(message: Callable[[], str], status: int) -> None:
    """Makes the process print a message and exit with `status` when jax aborts it because the others cannot be reached.

    jax aborts from a thread of its own, while others may be busy. It takes a callback for this, but 0.10.2 fails to
    convert the callback's argument; so the signal of the abort is caught.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(_):
        sys.stderr.write(f"error: {message()}\n")
        sys.stderr.flush()
        os._exit(status)

    ctypes.CDLL(None).signal(signal.SIGABRT, explain)
    _explain_abort.handler = explain  # ctypes does not keep it alive
