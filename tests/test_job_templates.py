"""What workers on Docker and Kubernetes start for a step, as far as it goes without either: their rendered job templates."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import Flow, FlowRun, WorkPool
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.job_templates import template, worker_class
from flows.pool_file import Pool, Servers, read_pools

SECRET = "correct horse % battery: staple"
HEAD = Servers(prefect="http://head:4200", mlflow="http://head:5000")
FILE = """
servers: {prefect: http://head:4200/api/, mlflow: http://head:5000/}
pools:
  gpu:
    type: kubernetes
    image: registry.example/posttrain:1
    namespace: training
    service_account: trainer
    credentials: posttrain/login
    secrets: {HF_TOKEN: hub/token}
    pull_secret: registry
    pull: Always
    gpus: 2
    cpus: 8
    memory: 64Gi
    shared_memory: 16Gi
    env: {HF_HOME: /cache/hub}
    volumes: [{path: /cache, claim: caches}, {path: /data, folder: /srv/data, read_only: true}]
    node_selector: {gpu: h100}
    keep: 60
  eval: {type: docker, image: "posttrain:1"}
  big:
    type: docker
    image: posttrain:1
    description: The two last GPUs.
    gpus: 2
    gpu_ids: ["2", "3"]
    cpus: 1.5
    memory: 512Mi
    shared_memory: 8Gi
    env: {HF_HOME: /cache/hub}
    volumes: [{path: /cache, claim: caches}, {path: /data, folder: /srv/data, read_only: true}]
    directory: /state
  fast: {type: process, env: {OMP_NUM_THREADS: "2"}}
"""


@pytest.fixture
def pools(tmp_path: Path) -> dict[str, Pool]:
    (tmp_path / "pools.yaml").write_text(FILE)
    file = read_pools(tmp_path / "pools.yaml")
    assert file.servers == HEAD
    return dict(file.pools)


@pytest.fixture(autouse=True)
def _a_worker_s_settings() -> Iterator[None]:
    own = {
        PREFECT_API_URL: "http://127.0.0.1:4200/api",
        PREFECT_API_AUTH_STRING: f"ada:{SECRET}",
        PREFECT_HOME: "/here/prefect",
    }
    with temporary_settings(cast("Any", own)):
        yield


def rendered(pool: Pool, servers: Servers = HEAD) -> Any:
    """The job configuration with which a worker of the pool starts a step."""
    made, worker = template(pool, servers), cast("Any", worker_class(pool.type))
    assert SECRET not in json.dumps(made), "all who use the servers read a pool's template"
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name="ppo")
    # The client is asked for blocks and variables alone, of which there are none.
    configuration = asyncio.run(worker.job_configuration.from_template_and_values(made, {}, client=SimpleNamespace()))
    work_pool = WorkPool(name="pool", type=pool.type, default_queue_id=uuid4())
    configuration.prepare_for_flow_run(
        run, flow=Flow(id=run.flow_id, name="step", labels={}), work_pool=work_pool, worker_name="worker"
    )
    return configuration


def container(pool: Pool, servers: Servers = HEAD) -> dict[str, Any]:
    """What Docker's client would send to its daemon."""
    containers: Any = importlib.import_module("docker.models.containers")
    worker: Any = worker_class(pool.type)
    daemon = SimpleNamespace(version=lambda: {"Version": "27.0.0"})
    settings = worker._build_container_settings(worker.__new__(worker), daemon, rendered(pool, servers))
    return containers._create_container_args({**settings, "version": "1.45"})


def as_a_cluster_reads_it(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what Kubernetes's own types do not have."""
    from kubernetes_asyncio.client import ApiClient

    async def read() -> dict[str, Any]:
        async with ApiClient() as client:
            return client.sanitize_for_serialization(client.deserialize(SimpleNamespace(data=json.dumps(manifest)), "V1Job"))

    return asyncio.run(read())


def test_a_pod(pools: dict[str, Pool]) -> None:
    job = rendered(pools["gpu"]).job_manifest
    assert SECRET not in json.dumps(job)
    assert (job["metadata"]["namespace"], job["metadata"]["generateName"]) == ("training", "ppo-")
    assert (job["spec"]["backoffLimit"], job["spec"]["ttlSecondsAfterFinished"]) == (0, 60)
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["nodeSelector"] == {"gpu": "h100"}
    [toleration] = pod["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu"
    [one] = pod["containers"]
    assert (one["image"], one["imagePullPolicy"]) == ("registry.example/posttrain:1", "Always")
    assert one["args"] == ["prefect", "flow-run", "execute"]
    assert one["workingDir"] == "/posttrain"
    assert one["resources"] == {
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "2"},
        "requests": {"cpu": "8", "memory": "64Gi"},
    }
    env = {variable.pop("name"): variable for variable in one["env"]}
    assert len(env) == len(one["env"])
    assert env["PREFECT_API_URL"] == {"value": "http://head:4200/api"}
    assert env["MLFLOW_TRACKING_URI"] == {"value": "http://head:5000"}
    assert env["POSTTRAIN_HOME"] == {"value": "/posttrain"}
    assert env["HF_HOME"] == {"value": "/cache/hub"}
    assert env["HF_TOKEN"] == {"valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert env["PREFECT_API_AUTH_STRING"] == {"valueFrom": {"secretKeyRef": {"name": "posttrain", "key": "login"}}}
    assert env["POSTTRAIN_CREDENTIALS"] == {"value": "PREFECT_API_AUTH_STRING"}
    assert "PREFECT_HOME" not in env, "it is a folder of the worker's machine"
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert {mount["mountPath"]: (volumes[mount["name"]], mount["readOnly"]) for mount in one["volumeMounts"]} == {
        "/cache": ({"persistentVolumeClaim": {"claimName": "caches"}}, False),
        "/data": ({"hostPath": {"path": "/srv/data", "type": "DirectoryOrCreate"}}, True),
        "/posttrain": ({"emptyDir": {}}, False),
        "/dev/shm": ({"emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}, False),
    }


def test_a_cluster_knows_every_word_of_a_manifest(pools: dict[str, Pool]) -> None:
    job = rendered(pools["gpu"]).job_manifest
    pod = job["spec"]["template"]["spec"]
    # Prefect's own template has these two of the job among the pod's.
    for misplaced in ("completions", "parallelism"):
        del pod[misplaced]
    assert as_a_cluster_reads_it(job) == job


def test_a_container(pools: dict[str, Pool]) -> None:
    big = container(pools["big"])
    assert (big["image"], big["command"], big["working_dir"]) == ("posttrain:1", "prefect flow-run execute", "/state")
    host = big["host_config"]
    assert host["DeviceRequests"] == [
        {"Driver": "", "Count": 0, "DeviceIDs": ["2", "3"], "Capabilities": [["gpu"]], "Options": {}}
    ]
    assert (host["NanoCpus"], host["Memory"], host["ShmSize"]) == (1_500_000_000, 512 * 2**20, 8 * 2**30)
    assert host["Binds"] == ["caches:/cache", "/srv/data:/data:ro"]
    assert host["AutoRemove"]
    env = big["environment"]
    assert env["PREFECT_API_URL"] == "http://head:4200/api"
    assert env["MLFLOW_TRACKING_URI"] == "http://head:5000"
    assert (env["POSTTRAIN_HOME"], env["HF_HOME"]) == ("/state", "/cache/hub")
    assert "PREFECT_HOME" not in env
    # The worker hands its own on; no pool and no deployment has it.
    assert env[env["POSTTRAIN_CREDENTIALS"]] == f"ada:{SECRET}"


def test_a_container_beside_its_servers(pools: dict[str, Pool]) -> None:
    here = Servers(prefect="http://127.0.0.1:4200", mlflow="http://127.0.0.1:5000")
    plain = container(pools["eval"], here)
    assert plain["host_config"]["NetworkMode"] == "host"
    assert plain["environment"]["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert not plain["host_config"].keys() & {"DeviceRequests", "Memory", "NanoCpus"}
    assert container(pools["eval"])["host_config"].get("NetworkMode") != "host", "servers elsewhere need nothing"


def test_a_gpu_by_number_of_them(tmp_path: Path) -> None:
    (tmp_path / "pools.yaml").write_text("pools: {gpu: {type: docker, image: x, gpus: 1}}")
    [one] = read_pools(tmp_path / "pools.yaml").pools.values()
    [asked] = container(one)["host_config"]["DeviceRequests"]
    assert (asked["Count"], asked["DeviceIDs"]) == (1, [])


def test_a_process(pools: dict[str, Pool], tmp_path: Path) -> None:
    made = template(pools["fast"], HEAD, tmp_path)["variables"]["properties"]
    assert made["working_dir"]["default"] == str(tmp_path)
    assert made["env"]["default"] == {"OMP_NUM_THREADS": "2"}
    assert rendered(pools["fast"]).env["OMP_NUM_THREADS"] == "2"
    assert "MLFLOW_TRACKING_URI" not in made["env"]["default"], "a process has its worker's"
