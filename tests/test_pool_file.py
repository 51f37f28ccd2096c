"""A file of work pools: what is wrong with it, in words, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import pool_file
from flows.control import Up, _workers
from flows.pool_file import DockerPool, KubernetesPool, PoolFile, ProcessPool, Servers, read_pools
from stages.errors import InputError
from tasks.credentials import BOTH, PASSWORD, USER, Credentials, credentials
from tasks.lease import GPUS

HERE = Servers(prefect="http://127.0.0.1:4200", mlflow="http://127.0.0.1:5000")
HEAD = Servers(prefect="http://head:4200", mlflow="http://head:5000")
POD = KubernetesPool(type="kubernetes", image="x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pools: {gpu: {type: kubernets}}", "pools.gpu: a pool has a `type`: process, docker, kubernetes"),
        ("pools: {gpu: docker}", "pools.gpu: a pool has a `type`: process, docker, kubernetes"),
        ("pools: {gpu: {type: docker}}", "pools.gpu: image is missing: The image that a step runs in"),
        ("pools: {gpu: {type: docker, image: x, gpu: 1}}", "pools.gpu: unknown key gpu; did you mean gpus?"),
        ("pools: {gpu: {type: docker, image: x, namespace: y}}", "pools.gpu: unknown key namespace"),
        ("pools: {gpu: {type: docker, image: x, memory: 64GB}}", "pools.gpu: memory: .*'64GB'"),
        ("pools: {gpu: {type: docker, image: x, volumes: [{path: /x}]}}", "volumes.0: give either `claim` or `folder`"),
        ("pools: {gpu: {type: docker, image: x, gpus: 1, gpu_ids: ['0', '1']}}", "`gpu_ids` names 2, but `gpus` is 1"),
        ("pools: {gpu: {type: kubernetes, image: x, credentials: login}}", "pools.gpu: credentials: .*'login'"),
        ("servers: {prefect: head}\npools: {}", "servers: mlflow is missing: MLflow's address as jobs reach it"),
        ("pool: {}\npools: {}", "unknown key pool; did you mean pools?"),
        ("gpu: {type: docker}", "work pools are a mapping with a key `pools`"),
        ("pools: [", "not YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "pools.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=words.replace("?", r"\?")) as raised:
        read_pools(file)
    assert all(line.startswith(str(file)) for line in str(raised.value).splitlines()[:1])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pools\.yaml: No such file or directory"):
        read_pools(tmp_path / "pools.yaml")


def test_every_field_says_what_it_is() -> None:
    for kind in (Servers, pool_file.Volume, ProcessPool, DockerPool, KubernetesPool):
        assert [name for name, field in kind.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("pools", "servers", "guarded", "words"),
    [
        ({"gpu": POD}, HERE, False, r"the work pool gpu: a pod cannot reach http://127\.0\.0\.1:4200: say .* `servers`"),
        ({"gpu": POD}, HEAD, True, r"the work pool gpu: the servers ask who is there: .* `credentials: SECRET/KEY`"),
        ({"control": POD}, HEAD, False, "the work pool control: pipelines are processes of the machine"),
    ],
)
def test_pools_whose_jobs_would_not_reach_the_servers(
    pools: dict[str, pool_file.Pool], servers: Servers, guarded: bool, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        PoolFile(pools).check(servers, guarded)
    PoolFile({"gpu": POD}).check(HEAD, guarded=False)
    PoolFile({"gpu": DockerPool(type="docker", image="x")}).check(HERE, guarded=True)


def test_a_platform_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_file, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"its platform needs a part that is not installed: install posttrain\[kubernetes\]"):
        PoolFile({"gpu": POD}).check(HEAD, guarded=False)


def test_a_pool_s_workers(tmp_path: Path) -> None:
    """Of a platform's own type; alone where two jobs at once would meet on one GPU."""
    docker = DockerPool(type="docker", image="x", gpus=1)
    file = PoolFile({"gpu": docker, "eval": DockerPool(type="docker", image="x"), "big": POD})
    names = ["control", "gpu", "eval", "big"]
    made = _workers(tmp_path, Up(pools=names, file=file, gpus=["0", "1"]))
    told = [
        [one.command[at + 1] for at, word in enumerate(one.command) if word in ("--pool", "--type", "--limit")] for one in made
    ]
    assert told == [["control", "process"], ["gpu", "docker", "1"], ["eval", "docker"], ["big", "kubernetes"]]
    assert not any("CUDA_VISIBLE_DEVICES" in one.settings for one in made)
    processes = _workers(tmp_path, Up(pools=["gpu"], gpus=["0,1", "2,3"]))
    assert [one.settings["CUDA_VISIBLE_DEVICES"] for one in processes] == ["0,1", "2,3"]
    assert [one.settings[GPUS] for one in processes] == ["0,1", "2,3"]
    [cpu] = _workers(tmp_path, Up(pools=["cpu"]))
    assert (cpu.settings["CUDA_VISIBLE_DEVICES"], GPUS in cpu.settings) == ("", False), "no step of it finds a GPU"
    assert all(one.command[-2:] == ["--limit", "1"] for one in processes)


def test_a_container_s_one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (USER, PASSWORD, "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(BOTH, "PREFECT_API_AUTH_STRING")
    assert credentials() is None, "servers that ask nobody"
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ada:correct: horse battery")
    assert credentials() == Credentials("ada", "correct: horse battery")
