"""Clusters: this process's rank and the number of processes, from SLURM, Open MPI, GKE or the metadata of a Cloud
TPU."""

import dataclasses
import importlib.util
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from deepseek_jax.errors import ConfigError

# a job's number chooses among the last ports, so that two jobs on one machine rarely meet
HIGHEST_PORT, PORTS = 65535, 2**12
TPU_PORT = 8482
METADATA = "http://{host}/computeMetadata/v1/instance/attributes/{key}"


@dataclasses.dataclass(frozen=True)
class Found:
    """Process `process_id` of `num_processes`, `local_id` on its machine; process 0 runs on `host`."""

    host: str
    port: int
    num_processes: int
    process_id: int
    local_id: int | None = None
    sharing: bool = False  # its machine with others of the run


def find(environment: Mapping[str, str], seconds: float) -> Found | None:
    """The rank that the launcher gave this process; None without a launcher. Waits up to `seconds` for the name of a
    TPU's first machine."""
    for cluster in (open_mpi, slurm, lambda environment: tpu(environment, seconds)):
        if found := cluster(environment):
            return found
    return None


def open_mpi(environment: Mapping[str, str]) -> Found | None:
    """`mpirun` names itself in a URI such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; job numbers are multiples
    of 2^12."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri")
    if uri is None:
        return None
    host = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if host is None:
        raise ConfigError(
            f"OMPI_MCA_orte_hnp_uri={uri} names no address: give --coordinator, --num_processes and --process_id"
        )
    count, process, local = (int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK"))
    sharing = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    return Found(host[1] or host[2], _port(int(uri.partition(".")[0]) // 2**12), count, process, local, sharing)


def slurm(environment: Mapping[str, str]) -> Found | None:
    """`srun` lists a step's nodes as node[007-009,011],other. A shell inside a job inherits the job's number of tasks:
    the step's counts."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environment for name in names):
        return None
    job, nodes, tasks, process, local = (environment[name] for name in names)
    prefix, first = re.match(r"([^,\[]*)(?:\[([^,\-\]]*))?", nodes).groups()
    sharing = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0] != "1"
    return Found(
        prefix + (first or ""),
        _port(int(job)),
        int(environment.get("SLURM_STEP_NUM_TASKS", tasks)),
        int(process),
        int(local),
        sharing,
    )


def tpu(environment: Mapping[str, str], seconds: float) -> Found | None:
    """A slice's machines in order, from GKE's variables or a Cloud TPU's metadata; MEGASCALE_… where there are several
    slices.

    jax sets TPU_SKIP_MDS_QUERY on a machine without TPUs, which has no such metadata.
    """
    if not (importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in environment):
        return None
    named = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if named is not None:
        machines, number, more = named.split(","), environment.get("TPU_WORKER_ID", "0"), {}
    elif "TPU_SKIP_MDS_QUERY" in environment or (number := _metadata(environment, "agent-worker-number")) is None:
        return None
    else:
        # Either host,host,… or name:id:address,…
        machines = [
            machine.rpartition(":")[2]
            for machine in (_metadata(environment, "worker-network-endpoints") or "").split(",")
        ]
        lines = (line.partition(":") for line in (_metadata(environment, "tpu-env") or "").splitlines())
        more = {key.strip(): value.strip().strip("'") for key, _, value in lines}
    coordinator, slices, slice_id = (
        (more | dict(environment)).get(f"MEGASCALE_{name}")
        for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")
    )
    count, process = len(machines) * int(slices or 1), int(number) + len(machines) * int(slice_id or 0)
    host = (coordinator or machines[0]).partition(":")[0]
    if count > 1:
        _wait_for_name(host, seconds)
    return Found(host, TPU_PORT, count, process)


def _port(job: int) -> int:
    return HIGHEST_PORT + 1 - PORTS + job % PORTS


def _metadata(environment: Mapping[str, str], key: str, tries: int = 6) -> str | None:
    """A value of Google Cloud's metadata about this machine; None where the value or the server does not exist."""
    url = METADATA.format(host=environment.get("GCE_METADATA_IP", "metadata.google.internal"), key=key)
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10
            ) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError:  # there is a server: it may not be ready
            time.sleep(0.5 if attempt + 1 < tries else 0)
        except OSError:
            return None
    return None


def _wait_for_name(host: str, seconds: float) -> None:
    """Waits until a machine has a name: machines start one after another. Raises ConfigError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.gethostbyname(host)
            return
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{host}, the machine of process 0, has no address after {seconds:.0f} s: start it, or give "
                    "--coordinator"
                ) from error
            time.sleep(min(5.0, seconds))
