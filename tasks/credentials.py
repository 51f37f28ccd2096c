"""The one user whom guarded servers let in. Name and password come from the environment, for servers and clients alike.

They are never an argument, which others see in the list of processes, and lie in no file, log, tag or job variable of ours:
who has a shell as the same user can read the environment of our processes, and nobody else can.
"""

from __future__ import annotations

import base64
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from http.client import HTTPException

from stages.errors import InputError

USER, PASSWORD = "POSTTRAIN_USER", "POSTTRAIN_PASSWORD"
# For containers, which are given one secret: the name of the variable that has both, with a colon between them.
BOTH = "POSTTRAIN_CREDENTIALS"
# MLflow takes no shorter one.
SHORTEST = 12
ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Credentials:
    """A name and a password that both servers take."""

    user: str
    password: str = field(repr=False)

    @property
    def pair(self) -> str:
        """As basic authentication, and Prefect's page, write it."""
        return f"{self.user}:{self.password}"

    def for_clients(self) -> dict[str, str]:
        """What Prefect's and MLflow's clients read from the environment."""
        return {
            "PREFECT_API_AUTH_STRING": self.pair,
            "MLFLOW_TRACKING_USERNAME": self.user,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }


def credentials() -> Credentials | None:
    """Those of the environment, if any. Raises InputError when they are not whole, or not what both servers take."""
    user, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    if not user and not password:
        user, _, password = os.environ.get(os.environ.get(BOTH, ""), "").partition(":")
    if not user and not password:
        return None
    if not user or not password:
        raise InputError(f"{PASSWORD if user else USER} is not set in the environment, but {USER if user else PASSWORD} is")
    if ":" in user or not user.isascii() or not user.isprintable():
        raise InputError(f"{USER}: a name must be of plain ASCII characters without a colon")
    if len(password) < SHORTEST or not password.isascii() or not password.isprintable():
        raise InputError(f"{PASSWORD}: a password must be of at least {SHORTEST} plain ASCII characters")
    return Credentials(user, password)


@cache
def check(prefect: str | None, mlflow: str | None) -> None:
    """Raise InputError when a server (Prefect's API, MLflow) does not let in whom the environment names to its clients.

    One that cannot be reached is not this function's to tell of.
    """
    if prefect is not None and "PREFECT_API_KEY" not in os.environ:
        _ask("Prefect", prefect, os.environ.get("PREFECT_API_AUTH_STRING"))
    if mlflow is not None and "MLFLOW_TRACKING_TOKEN" not in os.environ:
        user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
        _ask("MLflow", mlflow, f"{user}:{password}" if user else None)


def _ask(name: str, address: str, pair: str | None) -> None:
    request = urllib.request.Request(f"{address}/version")
    if pair is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.UNAUTHORIZED:
            return
    except (OSError, HTTPException):
        return
    if pair is None:
        raise InputError(f"the {name} server of {address} asks who is there: set {USER} and {PASSWORD} in the environment")
    raise InputError(
        f"the {name} server of {address} does not let in the user of {USER} and {PASSWORD}: set those that it was started with"
    )
