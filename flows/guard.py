"""Servers that ask who is there: basic authentication of Prefect and of MLflow, by the one user of the environment."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from pathlib import Path

from stages.errors import InputError
from tasks.credentials import PASSWORD, USER, Credentials, credentials

LOOPBACK = "127.0.0.1"
MLFLOW = ("--factory", "mlflow.server.auth:create_app")


def required(host: str) -> Credentials | None:
    """Who is let in by servers at this host. Raises InputError when others can reach it and nobody is named."""
    known = credentials()
    if known is None and not is_loopback(host):
        raise InputError(
            f"--host {host}: others could use these servers, which run whatever they are told. Set {USER} and {PASSWORD} in "
            "the environment, and both will ask for them; or leave --host out"
        )
    return known


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host. A name but localhost may come to mean another address at any time."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def nearby(host: str) -> str:
    """The host by which processes of this machine reach servers that listen at `host`."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)


def afar(host: str) -> str:
    """The host by which other machines reach servers that listen at `host`."""
    return socket.gethostname() if nearby(host) != host else host


def url(host: str, port: int) -> str:
    """A server's address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def settings(root: Path, host: str, mlflow_port: int, known: Credentials | None) -> tuple[dict[str, str], dict[str, str]]:
    """What the environments of Prefect's and MLflow's server have besides, to be at this host and let this user in alone."""
    prefect: dict[str, str] = {}
    mlflow: dict[str, str] = {}
    if known is not None:
        prefect["PREFECT_SERVER_API_AUTH_STRING"] = known.pair
        mlflow |= mlflow_users(root, known)
    if not is_loopback(host):
        # Whatever name a browser knows this machine by, the page calls the server that it came from.
        prefect["PREFECT_UI_API_URL"] = "/api"
        mlflow |= mlflow_names(host, mlflow_port)
    return prefect, mlflow


def mlflow_users(root: Path, known: Credentials) -> dict[str, str]:
    """The environment of an MLflow server that knows this user alone.

    MLflow would keep its first user for ever, with the first password. So its users are made anew at every start: those of an
    earlier environment are gone.
    """
    folder = root / "auth"
    folder.mkdir(mode=0o700, exist_ok=True)
    for file in folder.glob("users.db*"):
        file.unlink()
    config = folder / "mlflow.ini"
    lines = [
        "[mlflow]",
        "default_permission = READ",
        # A configuration file's percent sign begins a reference.
        f"database_uri = sqlite:///{folder / 'users.db'}".replace("%", "%%"),
        # Without it every request costs a tenth of a second, which a hash of the password takes.
        "auth_cache_ttl_seconds = 600",
    ]
    config.write_text("\n".join(lines) + "\n")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": known.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": known.password,
        # What signs the forms of its pages lives as long as the server.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        # Else the application leaves out the part that passes artifacts on.
        "_MLFLOW_SGI_NAME": "uvicorn",
    }


def mlflow_names(host: str, port: int) -> dict[str, str]:
    """The names under which an MLflow server that others reach is called, beside those of loopback.

    What the environment says already, for a proxy in front of it, stays.
    """
    names = {host, afar(host), socket.gethostname(), socket.getfqdn(), *_addresses()}
    named = {
        # The check is against pages that come to be of this machine's address; they do not know the password.
        "MLFLOW_SERVER_ALLOWED_HOSTS": "*",
        # Browsers do send it, once they know it, with what a page of another origin asks for.
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(sorted(url(name, port) for name in names)),
    }
    return {name: value for name, value in named.items() if name not in os.environ}


def _addresses() -> set[str]:
    """This machine's own addresses, as far as its name tells them."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None)}
    except OSError:
        return set()
