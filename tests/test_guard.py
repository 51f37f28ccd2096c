"""Who is let in: credentials of the environment, hosts that need them, what servers and clients are told."""

from __future__ import annotations

import base64
import configparser
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from test_cli import posttrain

from flows import guard
from flows.control import Up
from stages.errors import InputError
from tasks.credentials import PASSWORD, USER, Credentials, check, credentials

SECRET = "correct horse % battery: staple"


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (USER, PASSWORD, *Credentials("", "").for_clients()):
        monkeypatch.delenv(name, raising=False)


def given(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    monkeypatch.setenv(USER, user)
    monkeypatch.setenv(PASSWORD, password)


def test_an_environment_names_somebody_or_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials() is None
    given(monkeypatch, "", "")
    assert credentials() is None
    given(monkeypatch, "ada", SECRET)
    known = Credentials("ada", SECRET)
    assert credentials() == known
    assert known.for_clients() == {
        "PREFECT_API_AUTH_STRING": f"ada:{SECRET}",
        "MLFLOW_TRACKING_USERNAME": "ada",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
    }
    assert SECRET not in repr(known)


@pytest.mark.parametrize(
    ("user", "password", "words"),
    [
        ("ada", "", f"{PASSWORD} is not set in the environment, but {USER} is"),
        ("", SECRET, f"{USER} is not set in the environment, but {PASSWORD} is"),
        ("a:da", SECRET, f"{USER}: a name must be of plain ASCII characters without a colon"),
        ("Ada", "short", f"{PASSWORD}: a password must be of at least 12 plain ASCII characters"),
        ("Ada", "Grünspechtgesang", f"{PASSWORD}: a password must be of at least 12 plain ASCII characters"),
        ("Ada", "two lines\nof it all", f"{PASSWORD}: a password must be of at least 12 plain ASCII characters"),
    ],
)
def test_credentials_that_servers_would_not_take(monkeypatch: pytest.MonkeyPatch, user: str, password: str, words: str) -> None:
    given(monkeypatch, user, password)
    with pytest.raises(InputError) as raised:
        credentials()
    assert str(raised.value) == words


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_nobody_need_be_named(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    assert guard.required(host) is None
    given(monkeypatch, "ada", SECRET)
    assert guard.required(host) == Credentials("ada", SECRET), "but who is named is asked for"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fd00::1", "head.example", "localhost.example"])
def test_elsewhere_somebody_must_be_named(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with pytest.raises(InputError, match=rf"--host {host}: .* Set {USER} and {PASSWORD} in the environment"):
        guard.required(host)
    given(monkeypatch, "ada", SECRET)
    assert guard.required(host) == Credentials("ada", SECRET)


def test_the_command_refuses_before_anything_starts(tmp_path: Path) -> None:
    done = posttrain(tmp_path, "up", "--host", "0.0.0.0", "--workers", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --host 0.0.0.0: others could use these servers")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_addresses_near_and_afar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "head")
    everywhere = Up(host="0.0.0.0", prefect_port=1, mlflow_port=2)
    assert everywhere.addresses == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert everywhere.told == ("http://head:1", "http://head:2")
    assert Up(host="::", prefect_port=1).addresses[0] == "http://[::1]:1"
    one = Up(host="fd00::1", prefect_port=1, mlflow_port=2)
    assert one.addresses == one.told == ("http://[fd00::1]:1", "http://[fd00::1]:2")
    joined = Up(host="0.0.0.0", prefect="http://p", mlflow="http://m")
    assert joined.addresses == joined.told == ("http://p", "http://m")


def test_what_servers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "100% mine"
    root.mkdir()
    assert guard.settings(root, "127.0.0.1", 5000, None) == ({}, {})
    assert list(root.iterdir()) == []

    prefect, mlflow = guard.settings(root, "127.0.0.1", 5000, Credentials("ada", SECRET))
    assert prefect == {"PREFECT_SERVER_API_AUTH_STRING": f"ada:{SECRET}"}
    assert (mlflow["MLFLOW_AUTH_ADMIN_USERNAME"], mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"]) == ("ada", SECRET)
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in mlflow
    config = configparser.ConfigParser()
    config.read(mlflow["MLFLOW_AUTH_CONFIG_PATH"])
    assert config["mlflow"]["database_uri"] == f"sqlite:///{root}/auth/users.db"
    assert (root / "auth").stat().st_mode & 0o777 == 0o700
    assert not any(SECRET in file.read_text() for file in (root / "auth").iterdir())

    (root / "auth" / "users.db").write_text("those of an earlier environment")
    prefect, again = guard.settings(root, "head.example", 5000, Credentials("ada", SECRET))
    assert not (root / "auth" / "users.db").exists()
    assert again["MLFLOW_FLASK_SERVER_SECRET_KEY"] != mlflow["MLFLOW_FLASK_SERVER_SECRET_KEY"]
    assert prefect["PREFECT_UI_API_URL"] == "/api"
    assert "http://head.example:5000" in again["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    monkeypatch.setenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "https://proxy.example")
    assert "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS" not in guard.mlflow_names("head.example", 5000), "the environment's word stays"


@contextmanager
def asking(pair: str | None) -> Iterator[str]:
    """A server that lets in who sends this pair; everybody without one."""
    wanted = None if pair is None else f"Basic {base64.b64encode(pair.encode()).decode()}"

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if wanted in (None, self.headers["Authorization"]) else 401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_clients_hear_in_words_that_they_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Credentials("ada", SECRET)
    with asking(known.pair) as guarded, asking(None) as open_one:
        check(open_one, None)
        with pytest.raises(InputError, match=f"the Prefect server of {guarded} asks who is there: set {USER} and {PASSWORD}"):
            check(guarded, open_one)
        for name, value in Credentials("ada", SECRET[::-1]).for_clients().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=f"the MLflow server of {guarded} does not let in the user of {USER}") as raised:
            check(open_one, guarded)
        assert SECRET[::-1] not in str(raised.value)
        for name, value in known.for_clients().items():
            monkeypatch.setenv(name, value)
        check(guarded, guarded)
    check("http://127.0.0.1:9", "http://127.0.0.1:9")  # one that cannot be reached is told of elsewhere
