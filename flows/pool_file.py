"""Work pools by description: a YAML file says on which platform each pool's steps run, and in what.

servers: {prefect: http://head:4200, mlflow: http://head:5000}      # as jobs reach them
pools:
  gpu:  {type: kubernetes, image: ghcr.io/me/posttrain:1, gpus: 1, memory: 64Gi, credentials: posttrain/login}
  eval: {type: docker, image: posttrain:1}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlparse

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from flows.guard import is_loopback
from flows.recipe import explain, near
from stages.errors import InputError
from stages.specs import Config

CONTROL = "control"
KEYS = ("servers", "pools")
REFERENCE = r"^[^/\s]+/[^/\s]+$"


class Servers(Config):
    """Addresses of the servers."""

    prefect: str = Field(pattern=r"^https?://", description="Prefect's address as jobs reach it, without /api.")
    mlflow: str = Field(pattern=r"^https?://", description="MLflow's address as jobs reach it.")

    @field_validator("prefect", "mlflow")
    @classmethod
    def _bare(cls, address: str) -> str:
        return address.rstrip("/").removesuffix("/api")


class Volume(Config):
    """Storage that outlives a job."""

    path: str = Field(pattern=r"^/", description="Where the job sees it.")
    claim: str | None = Field(
        default=None,
        description="Which storage, by name: a volume of Docker, or a persistent volume claim of Kubernetes.",
    )
    folder: str | None = Field(default=None, pattern=r"^/", description="Instead of a claim: a folder of the machine.")
    read_only: bool = Field(default=False, description="Whether the job can only read it.")

    @model_validator(mode="after")
    def _one_source(self) -> Volume:
        if (self.claim is None) == (self.folder is None):
            raise ValueError("give either `claim` or `folder`")
        return self


class ProcessPool(Config):
    """Steps are processes of a worker's own machine."""

    type: Literal["process"] = Field(description="process.")
    description: str = Field(default="", description="What Prefect's page says of the pool.")
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of the steps. No passwords.")


class Containers(Config):
    """What both platforms of containers have."""

    description: str = Field(default="", description="What Prefect's page says of the pool.")
    image: str = Field(min_length=1, description="The image that a step runs in: Python with posttrain installed.")
    pull: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="When the image is fetched from its registry."
    )
    gpus: int = Field(default=0, ge=0, description="NVIDIA GPUs of a step.")
    cpus: float | None = Field(default=None, gt=0, description="Processor cores of a step; no limit when left out.")
    memory: str | None = Field(
        default=None, pattern=r"^[1-9]\d*(Mi|Gi)$", description="Memory of a step, such as 64Gi; no limit when left out."
    )
    shared_memory: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d*(Mi|Gi)$",
        description="Size of /dev/shm, through which several GPUs talk to each other: 64 MB when left out.",
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the steps. No passwords: all who use the servers see them.",
    )
    volumes: list[Volume] = Field(
        default_factory=list, description="Storage for caches: of the hub's models, or of artifacts, at `directory`."
    )
    directory: str = Field(
        default="/posttrain", pattern=r"^/", description="A step's working directory, with its state and cache of artifacts."
    )


class DockerPool(Containers):
    """Steps are containers on a worker's own machine."""

    type: Literal["docker"] = Field(description="docker.")
    gpu_ids: list[str] = Field(
        default_factory=list,
        description="Which GPUs, by number, when not the first ones: on a machine with several sets a pool for each.",
    )
    network: str | None = Field(
        default=None, description="Docker's network; `host` when the servers are on the loopback of the same machine."
    )

    @model_validator(mode="after")
    def _as_many_gpus(self) -> DockerPool:
        if self.gpu_ids and len(self.gpu_ids) != self.gpus:
            raise ValueError(f"`gpu_ids` names {len(self.gpu_ids)}, but `gpus` is {self.gpus}")
        return self


class KubernetesPool(Containers):
    """Steps are jobs of a Kubernetes cluster."""

    type: Literal["kubernetes"] = Field(description="kubernetes.")
    namespace: str = Field(default="default", description="The namespace of the jobs.")
    service_account: str | None = Field(default=None, description="The service account of the jobs.")
    credentials: str | None = Field(
        default=None,
        pattern=REFERENCE,
        description="SECRET/KEY with `user:password` of the servers, when they ask for it.",
    )
    secrets: dict[str, str] = Field(
        default_factory=dict, description="Environment variables from secrets: NAME: SECRET/KEY, for example of a judge's key."
    )
    pull_secret: str | None = Field(default=None, description="The secret that lets the cluster fetch the image.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes that may run the jobs.")
    keep: int = Field(default=3600, ge=0, description="Seconds for which a finished job stays to be looked at.")


Pool = ProcessPool | DockerPool | KubernetesPool
KINDS: dict[str, type[Pool]] = {"process": ProcessPool, "docker": DockerPool, "kubernetes": KubernetesPool}


@dataclass(frozen=True)
class PoolFile:
    """Pools by name, and where their jobs find the servers, if that was said."""

    pools: Mapping[str, Pool] = field(default_factory=dict)
    servers: Servers | None = None

    def check(self, servers: Servers, guarded: bool) -> None:
        """Raise InputError when a pool's jobs could not reach these servers, be let in by them, or be started from here."""
        for name, pool in self.pools.items():
            where = f"the work pool {name}"
            if name == CONTROL and pool.type != "process":
                raise InputError(f"{where}: pipelines are processes of the machine where `posttrain up` was said")
            if pool.type != "process" and find_spec(f"prefect_{pool.type}") is None:
                raise InputError(f"{where}: its platform needs a part that is not installed: install posttrain[{pool.type}]")
            if not isinstance(pool, KubernetesPool):
                continue
            for address in (servers.prefect, servers.mlflow):
                if is_loopback(urlparse(address).hostname or ""):
                    raise InputError(
                        f"{where}: a pod cannot reach {address}: say in the file of pools, under `servers`, what it can reach"
                    )
            if guarded and pool.credentials is None:
                raise InputError(
                    f"{where}: the servers ask who is there: put user:password into a secret of the cluster and name it with "
                    "`credentials: SECRET/KEY`"
                )


def read_pools(path: Path) -> PoolFile:
    """A file's pools. Raises InputError with one line for each thing that is wrong."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("pools"), dict):
        raise InputError(f"{path}: work pools are a mapping with a key `pools`, of pools by name")
    for unknown in values.keys() - set(KEYS):
        raise InputError(f"{path}: unknown key {unknown}{near(str(unknown), KEYS)}")
    servers = None if values.get("servers") is None else _valid(Servers, values["servers"], f"{path}: servers")
    return PoolFile({str(name): _pool(given, f"{path}: pools.{name}") for name, given in values["pools"].items()}, servers)


def _pool(given: Any, where: str) -> Pool:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in KINDS:
        raise InputError(f"{where}: a pool has a `type`: {', '.join(KINDS)}")
    return _valid(KINDS[kind], given, where)


M = TypeVar("M", bound=BaseModel)


def _valid(kind: type[M], given: Any, where: str) -> M:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise InputError("\n".join(f"{where}: {explain(kind, problem)}" for problem in error.errors())) from None
