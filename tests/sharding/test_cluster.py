"""What launchers tell a process: variables, a TPU VM's metadata, a job's description."""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType, SimpleNamespace

import pytest
from jax._src.clusters import cloud_tpu_cluster, k8s_cluster

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
    "TPU_SKIP_MDS_QUERY": "true",
}
# A pod of a JobSet on GKE: of a slice of TPUs, and of nodes with GPUs.
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
GKE_SLICE = POD | {
    "TPU_WORKER_HOSTNAMES": "mine-slice-job-0-0.mine,mine-slice-job-0-1.mine",
    "TPU_WORKER_ID": "1",
}
GPU_POD = POD | {"HOSTNAME": "mine-gpu-0-1"}
# Attributes of a TPU VM: the second of four hosts, in the older and the newer form.
TPU_VM = {
    "agent-worker-number": "1",
    "worker-network-endpoints": ",".join(
        f"unknown:unknown:10.164.0.{n}" for n in "2345"
    ),
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nHOST_BOUNDS: '2,2,1'\nWORKER_ID: '1'",
}
NEWER = {"worker-network-endpoints": "10.164.0.2,10.164.0.3,10.164.0.4,10.164.0.5"}
ONE_HOST = {"worker-network-endpoints": "10.164.0.2", "agent-worker-number": "0"}
SECOND_SLICE = {
    "tpu-env": "MEGASCALE_COORDINATOR_ADDRESS: '10.164.0.9:8080'\n"
    "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nWORKER_ID: '1'"
}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, *ORTE, *GKE, *GPU_POD):
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


@pytest.fixture
def tpu_vm(monkeypatch):
    """A machine with TPUs, whose metadata server knows the attributes in the dict."""
    attributes = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            is_right = folder == "/computeMetadata/v1/instance/attributes"
            is_right &= self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if is_right and name in attributes else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "<html>: not found").encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    # JAX asks six times, and sleeps between.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.164.0.2")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        yield attributes
        server.shutdown()


@pytest.mark.parametrize(
    "attributes, variables, expected",
    [
        (TPU_VM, {}, Cluster("10.164.0.2:8482", 4, 1)),
        (TPU_VM | NEWER, {}, Cluster("10.164.0.2:8482", 4, 1)),
        (TPU_VM | SECOND_SLICE, {}, Cluster("10.164.0.9:8482", 8, 5)),
        (TPU_VM | ONE_HOST, {}, None),
        ({}, GKE_SLICE, Cluster("mine-slice-job-0-0.mine:8482", 2, 1)),
        # A machine with TPUs of another kind.
        ({}, {}, None),
    ],
)
def test_machines_with_tpus(monkeypatch, tpu_vm, attributes, variables, expected):
    tpu_vm |= attributes
    tell(monkeypatch, variables)
    assert find_cluster(ProcessesConfig()) == expected


@pytest.fixture
def kubernetes(monkeypatch):
    """The client of Kubernetes, in a pod of a job of four; returns pod and job."""
    labels = {"job-name": "mine-gpu-0"}
    owner = SimpleNamespace(controller=True, kind="Job")
    pod = SimpleNamespace(
        metadata=SimpleNamespace(name="p", labels=labels, owner_references=[owner]),
        spec=SimpleNamespace(subdomain="mine"),
    )
    job = SimpleNamespace(
        metadata=SimpleNamespace(name="mine-gpu-0", labels={}),
        spec=SimpleNamespace(parallelism=4),
    )

    def list_namespaced_pod(namespace, field_selector):
        assert (namespace, field_selector) == ("default", "status.podIP=10.4.0.7")
        return SimpleNamespace(items=[pod])

    def read_namespaced_job(name, namespace):
        assert (name, namespace) == ("mine-gpu-0", "default")
        return job

    client = ModuleType("kubernetes")
    client.config = SimpleNamespace(load_incluster_config=lambda: None)
    client.client = SimpleNamespace(
        CoreV1Api=lambda: SimpleNamespace(list_namespaced_pod=list_namespaced_pod),
        BatchV1Api=lambda: SimpleNamespace(read_namespaced_job=read_namespaced_job),
        exceptions=SimpleNamespace(ApiException=LookupError),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", client)
    kind = k8s_cluster.K8sCluster
    for name in ("_pod", "_job", "_controller"):
        vars(kind)[name].__func__.cache_clear()
    monkeypatch.setattr(kind, "_namespace", lambda: "default")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    addresses = {"mine-gpu-0-1": "10.4.0.7", "mine-gpu-0-0.mine": "10.4.0.6"}
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    return pod, job


@pytest.mark.parametrize("is_of_a_set", [True, False])
def test_jobs_of_kubernetes(monkeypatch, kubernetes, is_of_a_set):
    pod, job = kubernetes
    if is_of_a_set:
        pod.spec.subdomain = None
        job.metadata.labels["jobset.sigs.k8s.io/jobset-name"] = "mine"
    tell(monkeypatch, GPU_POD)
    assert find_cluster(ProcessesConfig()) == Cluster("mine-gpu-0-0.mine:55527", 4, 1)
    job.spec.parallelism = 1
    assert find_cluster(ProcessesConfig()) is None


def test_what_a_cluster_does_not_tell_is_asked_for(monkeypatch, tpu_vm, kubernetes):
    pod, _ = kubernetes
    tell(monkeypatch, GPU_POD)
    pod.spec.subdomain, kind = None, k8s_cluster.K8sCluster
    monkeypatch.setattr(kind, "_headless_svc", lambda: None)
    asked = r"found out \(.{30,}\): give processes\.coordinator .* processes\.detect"
    with pytest.raises(ValueError, match=asked):
        find_cluster(ProcessesConfig())
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:1")
    with pytest.raises(ValueError, match=asked):
        find_cluster(ProcessesConfig())
    assert find_cluster(ProcessesConfig(detect=False)) is None


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
