"""What launchers tell a process, as their variables."""

import pytest
from jax._src.clusters import cloud_tpu_cluster

from jaxlm.config import ProcessesConfig
from jaxlm.sharding.cluster import Cluster, find_cluster

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
# The second of two slices.
GKE = {
    "TPU_WORKER_HOSTNAMES": "slice-1-0,slice-1-1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, *ORTE, *GKE, "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


def tell(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables, expected",
    [
        (SLURM, ("gpu003:61441", 16, 9, [1])),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}, ("gpu003:61441", 16, 9, [0, 1])),
        ({**SLURM, "JAX_COORDINATOR_PORT": "12"}, ("gpu003:12", 16, 9, [1])),
        ({**OPEN_MPI, **ORTE}, ("10.96.0.1", 4, 3, [1])),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", 4, 3, [1])),
        (GKE, ("localhost", 4, 3, None)),
        # One process, a pod that is none of a job, and no launcher.
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({}, None),
    ],
)
def test_launchers(monkeypatch, variables, expected):
    tell(monkeypatch, variables)
    is_tpu = variables is GKE
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", is_tpu)
    found = find_cluster(ProcessesConfig())
    if expected is None:
        assert found is None
    else:
        assert found.coordinator.startswith(expected[0])
        assert found.coordinator.rpartition(":")[2].isdecimal()
        assert found[1:] == expected[1:]


def test_flags_come_first(monkeypatch):
    tell(monkeypatch, SLURM)
    given = ProcessesConfig(coordinator="host:9000", count=2, index=0)
    assert find_cluster(given) == Cluster("host:9000", 2, 0)
    port = ProcessesConfig(coordinator="host:9000")
    assert find_cluster(port) == Cluster("host:9000", 16, 9, [1])
    assert find_cluster(ProcessesConfig(detect=False)) is None
    assert find_cluster(ProcessesConfig(count=1)) is None


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"processes\.index is not known: give"):
        find_cluster(ProcessesConfig(coordinator="host:9000", count=2))
    with pytest.raises(ValueError, match=r"processes\.index is 2: it must be from 0"):
        find_cluster(ProcessesConfig(coordinator="host:9000", count=2, index=2))
    with pytest.raises(
        ValueError, match=r"coordinator is 'host': it must be HOST:PORT"
    ):
        ProcessesConfig(coordinator="host")
    tell(monkeypatch, OPEN_MPI)  # Version 5.
    with pytest.raises(ValueError, match=r"processes\.coordinator is not known"):
        find_cluster(ProcessesConfig())
