"""Finds out how many processes a run has, and which one this is.

By flags (`ProcessesConfig`), or from what a launcher has told: SLURM, Open MPI, a TPU
VM, GKE and other Kubernetes jobs. JAX knows these (`jax._src.clusters`); what it does
not know is added here.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from jax._src import clusters

from jaxlm.config import ProcessesConfig
from jaxlm.terminal.printable import error_line

_FLAGS = ("coordinator", "count", "index")
_DETECT_SECONDS = 300


class Cluster(NamedTuple):
    """The processes of a run, as this one sees them."""

    coordinator: str
    """HOST:PORT of process 0."""
    count: int
    index: int
    local_devices: Sequence[int] | None = None
    """The GPUs of this process by their numbers on its host; None: all."""


def find_cluster(config: ProcessesConfig) -> Cluster | None:
    """Returns the processes of this run; None if it is the only one.

    Raises:
      ValueError: if a launcher has started several, but not told what is needed, or a
        cluster cannot be asked.
    """
    coordinator, count, index, local = (*(getattr(config, n) for n in _FLAGS), None)
    if None in (coordinator, count, index) and config.detect:
        try:
            coordinator, count, index, local = _as_told(coordinator, count, index)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                "how many processes there are cannot be found out "
                f"({error_line(error, 200)}): give processes.coordinator HOST:PORT of "
                "process 0, processes.count and processes.index, or for one process "
                "processes.detect False"
            ) from error
    found = dict(zip(_FLAGS, (coordinator, count, index), strict=True))
    if count == 1 or not any(value is not None for value in found.values()):
        return None
    for name, value in found.items():
        if value is None:
            raise ValueError(
                f"processes.{name} is not known: give processes.coordinator HOST:PORT "
                "of process 0, processes.count and processes.index"
            )
    assert coordinator is not None and count is not None and index is not None
    if not 0 <= index < count:
        raise ValueError(
            f"processes.index is {index}: it must be from 0 to processes.count - 1"
        )
    return Cluster(coordinator, count, index, local)


def _as_told(
    coordinator: str | None, count: int | None, index: int | None
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Completes what flags say by what a launcher has told."""
    launcher, local = _launcher(), None
    if launcher is not None:
        count = launcher.get_process_count() if count is None else count
        if count > 1:
            index = launcher.get_process_id() if index is None else index
            local = _local_devices(launcher)
            coordinator = coordinator or _coordinator_of(launcher)
    return coordinator, count, index, local


class _OpenMpi:
    """Open MPI of any version; JAX needs mpi4py for version 5."""

    @staticmethod
    def get_process_count() -> int:
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])

    @staticmethod
    def get_process_id() -> int:
        return int(os.environ["OMPI_COMM_WORLD_RANK"])

    @staticmethod
    def get_local_process_id() -> int:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])


def _launcher():
    """Returns JAX's description of what has started this process, or None."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return _OpenMpi
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method or kind.name == "ompi":
            continue
        # Any pod is in Kubernetes, but not every pod is one of a job.
        is_pod = kind.__name__ == "K8sCluster"
        if is_pod and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if kind.is_env_present():
            return kind
    return None


def _coordinator_of(launcher) -> str | None:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return address
    if launcher is _OpenMpi:
        kinds = clusters.ClusterEnv._cluster_types
        launcher = next(kind for kind in kinds if kind.name == "ompi")
        if "OMPI_MCA_orte_hnp_uri" not in os.environ:  # Version 5 does not tell.
            return None
    return launcher.get_coordinator_address(
        timeout_secs=_DETECT_SECONDS, override_coordinator_port=port
    )


def _local_devices(launcher) -> Sequence[int] | None:
    """Launchers of a process for each GPU number the processes of a host."""
    if ids := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return [int(number) for number in ids.split(",")]
    local = launcher.get_local_process_id()
    return None if local is None else [local]
