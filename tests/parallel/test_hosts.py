"""Ranks of several processes, from launchers and flags; a single process, for which nothing happens."""

import json
import socket

import jax
import pytest

from deepseek_jax.errors import ConfigError
from deepseek_jax.parallel import clusters, hosts
from deepseek_jax.parallel.hosts import Hosts, detect, split_flags

SLURM = {  # `srun` of 3 tasks on 3 nodes, as the second of them sees it
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[007-009]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def environment(monkeypatch):
    """environment({...}) sets what a launcher would, over an environment without any launcher."""
    for name in (*SLURM, *OPEN_MPI, "CUDA_VISIBLE_DEVICES", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)

    def change(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


def test_flags_go_together():
    assert split_flags(["--config=x.py", "--dry"]) == (None, ["--config=x.py", "--dry"])
    flags = ["--coordinator=node7:1234", "--num_processes=4", "--process_id=3"]
    assert split_flags(["--config=x.py", *flags]) == (Hosts("node7:1234", 4, 3), ["--config=x.py"])
    assert split_flags(["--coordinator", "[::1]:1234", "--num_processes", "2", "--process_id", "0"])[0] == Hosts(
        "[::1]:1234", 2, 0
    )
    with pytest.raises(ConfigError, match="^--process_id missing: .* all three or none"):
        split_flags(flags[:2])
    with pytest.raises(ConfigError, match="^--coordinator and --num_processes missing"):
        split_flags(flags[2:])


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process_id", "message"),
    [
        ("node7", 2, 0, "--coordinator=node7: give HOST:PORT"),
        ("node7:port", 2, 0, "--coordinator=node7:port: give HOST:PORT"),
        (":1234", 2, 0, "--coordinator=:1234: give HOST:PORT"),
        ("node7:1234", 0, 0, "--num_processes=0: must be at least 1"),
        ("node7:1234", 2, 2, "--process_id=2: must be at least 0 and below 2"),
        ("node7:1234", 2, -1, "--process_id=-1: must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(coordinator, num_processes, process_id, message):
    with pytest.raises(ConfigError, match=message):
        Hosts(coordinator, num_processes, process_id)


def test_slurm(environment):
    environment(SLURM)
    port = 65535 - 2**12 + 1 + 4242 % 2**12
    assert detect() == Hosts(f"node007:{port}", 3, 1)  # one task on a node has all its devices
    environment(
        {"SLURM_STEP_TASKS_PER_NODE": "8(x3)", "SLURM_STEP_NUM_TASKS": "24", "SLURM_PROCID": "13", "SLURM_LOCALID": "5"}
    )
    assert detect() == Hosts(f"node007:{port}", 24, 13, (5,))
    environment({"CUDA_VISIBLE_DEVICES": "5"})  # as with --gpus-per-task=1: the launcher has chosen already
    assert detect() == Hosts(f"node007:{port}", 24, 13)


def test_a_shell_inside_a_slurm_job_is_one_process(environment):
    """`salloc --ntasks=3` and an interactive step: the job's tasks are not running yet."""
    environment(SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert detect() is None


def test_open_mpi(environment):
    environment(OPEN_MPI)
    found = detect()
    assert (found.num_processes, found.process_id, found.local_device_ids) == (
        4,
        2,
        (1,),
    ) and found.coordinator.startswith("10.96.0.1:")
    environment({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
    assert detect() is None


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node007", "node007"),
        ("a1,b2", "a1"),
        ("node[007-009]", "node007"),
        ("node[3,7-9],b", "node3"),
        ("n[12],b", "n12"),
        ("a-b-[1-2]", "a-b-1"),
    ],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert clusters.slurm(SLURM | {"SLURM_STEP_NODELIST": nodes}).host == first


def test_open_mpis_addresses():
    uri = "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d:c083::2]:43370"
    assert clusters.open_mpi(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri}).host == "fe80::b9b:ac5d"
    assert (
        detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri}).coordinator
        == f"[fe80::b9b:ac5d]:{65535 - 2**12 + 1 + 1314521088 // 2**12 % 2**12}"
    )
    with pytest.raises(ConfigError, match="names no address: give --coordinator"):
        clusters.open_mpi(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;usock"})


@pytest.fixture
def libtpu(monkeypatch):
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.1")


@pytest.mark.parametrize("endpoints", ["10.0.0.7,10.0.0.8", "tpu:0:10.0.0.7,tpu:1:10.0.0.8"])
def test_metadata_of_a_cloud_tpu(endpoints, libtpu, monkeypatch):
    """The second machine of a slice, alone and as the second of three slices; both forms of the list."""
    values = {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'us-east5'\n"}
    monkeypatch.setattr(clusters, "_metadata", lambda environment, key: values.get(key))
    assert detect({}) == Hosts("10.0.0.7:8482", 2, 1)
    values["tpu-env"] += (
        "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"
    )
    assert detect({}) == Hosts("10.0.0.1:8482", 6, 3)
    assert detect({"TPU_SKIP_MDS_QUERY": "1"}) is None
    values.clear()
    assert detect({}) is None


def test_a_first_machine_without_a_name_is_refused(libtpu, monkeypatch):
    def unknown(name):
        raise socket.gaierror

    monkeypatch.setattr("socket.gethostbyname", unknown)
    monkeypatch.setattr(hosts, "CONNECT_SECONDS", 0)
    with pytest.raises(ConfigError, match="tpu-0, the machine of process 0, has no address after 0 s"):
        detect({"TPU_WORKER_HOSTNAMES": "tpu-0,tpu-1"})


def test_gke(environment, libtpu):
    """A TPU slice of two machines."""
    environment(
        {
            "TPU_WORKER_HOSTNAMES": "tpu-0.svc,tpu-1.svc",
            "TPU_WORKER_ID": "1",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
        }
    )
    environment({"MEGASCALE_COORDINATOR_ADDRESS": "tpu-0.svc:8080"})
    assert detect() == Hosts("tpu-0.svc:8482", 2, 1)
    environment({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})
    assert detect() is None


def test_one_process_does_nothing(environment, tmp_path):
    environment({})
    assert detect() is None
    hosts.join(None)
    hosts.join(Hosts("nowhere:1", 1, 0))
    assert not jax.distributed.is_initialized() and hosts.is_primary()
    assert hosts.from_primary("naïve text") == "naïve text"
    assert hosts.all_true(True) and not hosts.all_true(False)
    hosts.write_text(tmp_path / "new" / "file.json", json.dumps({"a": 1}))
    assert (
        json.loads((tmp_path / "new" / "file.json").read_text()) == {"a": 1}
        and len(list((tmp_path / "new").iterdir())) == 1
    )
