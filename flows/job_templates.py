"""What a worker of a pool starts for a step: Prefect's base job templates, filled in from a pool's description.

No password is in them, since everybody on the servers can read them. A process has its worker's environment. A pod gets the
servers' `user:password` from a secret of its cluster, by reference. Docker has no secrets for single containers: its worker
hands on what it has itself, so that the password is in the container's environment, which those see who may use that Docker.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from prefect.workers.base import BaseWorker

from flows.guard import is_loopback
from flows.pool_file import Containers, DockerPool, KubernetesPool, Pool, ProcessPool, Servers, Volume
from tasks.credentials import BOTH
from tasks.home import PATIENT_RUNS

# The platforms' parts are installed where they are used.
WORKERS = {
    "process": ("prefect.workers.process", "ProcessWorker"),
    "docker": ("prefect_docker.worker", "DockerWorker"),
    "kubernetes": ("prefect_kubernetes.worker", "KubernetesWorker"),
}
# Prefect's workers hand their own settings on. These are of the worker's machine, and its password.
NOT_HANDED_ON = ("PREFECT_HOME", "PREFECT_SERVER_API_AUTH_STRING")
PAIR = "PREFECT_API_AUTH_STRING"
DOCKER_UNITS = {"Mi": "m", "Gi": "g"}


def worker_class(kind: str) -> type[BaseWorker[Any, Any, Any]]:
    """The class of a platform's worker."""
    module, name = WORKERS[kind]
    return getattr(importlib.import_module(module), name)


def template(pool: Pool, servers: Servers, directory: Path | None = None) -> dict[str, Any]:
    """A pool's base job template. Processes begin in `directory`, where it is given."""
    made = worker_class(pool.type).get_default_base_job_template()
    variables = made["variables"]["properties"]
    if isinstance(pool, ProcessPool):
        # As each worker's own PATH has it; so, too, Prefect starts one process for a run, in place of one after another.
        defaults: dict[str, Any] = {"command": "python -m flows.flow_process", "env": pool.env}
        defaults["working_dir"] = None if directory is None else str(directory)
    elif isinstance(pool, DockerPool):
        defaults = _docker(pool, servers)
    else:
        defaults = _kubernetes(pool, servers, made["job_configuration"]["job_manifest"]["spec"]["template"]["spec"])
    for variable, value in defaults.items():
        if value not in (None, {}, []):
            variables[variable]["default"] = value
    return made


def _environment(pool: Containers, servers: Servers) -> dict[str, str | None]:
    own = {
        "PREFECT_API_URL": f"{servers.prefect}/api",
        "MLFLOW_TRACKING_URI": servers.mlflow,
        "POSTTRAIN_HOME": pool.directory,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        **PATIENT_RUNS,
        BOTH: PAIR,
    }
    return {**dict.fromkeys(NOT_HANDED_ON), **own, **pool.env}


def _docker(pool: DockerPool, servers: Servers) -> dict[str, Any]:
    near = any(is_loopback(urlparse(address).hostname or "") for address in (servers.prefect, servers.mlflow))
    create: dict[str, Any] = {"working_dir": pool.directory}
    if pool.gpus:
        which = {"device_ids": pool.gpu_ids} if pool.gpu_ids else {"count": pool.gpus}
        create["device_requests"] = [{"capabilities": [["gpu"]], **which}]
    if pool.cpus is not None:
        create["nano_cpus"] = round(pool.cpus * 1e9)
    if pool.shared_memory is not None:
        create["shm_size"] = _docker_size(pool.shared_memory)
    return {
        "image": pool.image,
        "image_pull_policy": pool.pull,
        "env": _environment(pool, servers),
        "network_mode": pool.network or ("host" if near else None),
        "mem_limit": None if pool.memory is None else _docker_size(pool.memory),
        "volumes": [f"{v.claim or v.folder}:{v.path}{':ro' if v.read_only else ''}" for v in pool.volumes],
        "auto_remove": True,
        "container_create_kwargs": create,
    }


def _docker_size(size: str) -> str:
    return size[:-2] + DOCKER_UNITS[size[-2:]]


def _kubernetes(pool: KubernetesPool, servers: Servers, pod: dict[str, Any]) -> dict[str, Any]:
    """The variables' defaults; what they do not reach is written into the template's pod."""
    [container] = pod["containers"]
    secrets = pool.secrets | ({} if pool.credentials is None else {PAIR: pool.credentials})
    container["env"] = [{"name": name, "valueFrom": _key_of(reference)} for name, reference in secrets.items()]
    container["workingDir"] = pool.directory
    if pool.gpus:
        container["resources"]["limits"]["nvidia.com/gpu"] = str(pool.gpus)
        # Nodes with GPUs are often kept free of other pods by this taint.
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    volumes = [(volume.path, _storage(volume), volume.read_only) for volume in pool.volumes]
    if all(volume.path != pool.directory for volume in pool.volumes):
        volumes.append((pool.directory, {"emptyDir": {}}, False))
    if pool.shared_memory is not None:
        volumes.append(("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": pool.shared_memory}}, False))
    pod["volumes"] = [{"name": f"volume-{number}", **storage} for number, (_, storage, _) in enumerate(volumes)]
    container["volumeMounts"] = [
        {"name": f"volume-{number}", "mountPath": path, "readOnly": read_only}
        for number, (path, _, read_only) in enumerate(volumes)
    ]
    if pool.node_selector:
        pod["nodeSelector"] = dict(pool.node_selector)
    if pool.pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": pool.pull_secret}]
    return {
        "image": pool.image,
        "image_pull_policy": pool.pull,
        # The worker's own password would be in the job's manifest for all to read.
        "env": {PAIR: None, **_environment(pool, servers)},
        "namespace": pool.namespace,
        "service_account_name": pool.service_account,
        "cpu_request": None if pool.cpus is None else f"{pool.cpus:g}",
        "memory_request": pool.memory,
        "memory_limit": pool.memory,
        "finished_job_ttl": pool.keep,
    }


def _key_of(reference: str) -> dict[str, Any]:
    secret, _, key = reference.partition("/")
    return {"secretKeyRef": {"name": secret, "key": key}}


def _storage(volume: Volume) -> dict[str, Any]:
    if volume.claim is not None:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    return {"hostPath": {"path": volume.folder, "type": "DirectoryOrCreate"}}
