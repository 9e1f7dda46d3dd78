"""The token that a job server asks for, found as Ray finds it.

Ray's own client sends it only where ``RAY_AUTH_MODE=token`` was set before Ray was imported. Here
the server is asked first, which sends nothing, and gets the token if it wants one.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from drtune_ray.errors import EnvironmentProblem

ANSWER_SECONDS = 10.0
DEFAULT_FILE = "~/.ray/auth_token"
# Files of certificate authorities: Python's own and, in Ray's client, that of requests.
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True)
class Token:
    """What proves to a cluster that its user may run code there.

    Attributes:
        value: The secret.
        source: Where it was found.
    """

    value: str = field(repr=False)
    source: str


def needed_token(address: str) -> Token | None:
    """The token for a job server; None where it asks for none.

    Args:
        address: Of the server.

    Raises:
        EnvironmentProblem: If it does not answer, or asks for a token and there is none here.
    """
    if not _asks_for_token(address):
        return None
    if (token := _find_token()) is None:
        raise EnvironmentProblem(
            f"{address} asks for a token, and there is none here: copy {DEFAULT_FILE} of the "
            "cluster to this machine, name its copy in RAY_AUTH_TOKEN_PATH, or put the token into "
            "RAY_AUTH_TOKEN. Nothing was sent"
        )
    return token


def certificates() -> str | None:
    """The file of certificate authorities that the user named; None: those of the system."""
    return next((os.environ[name] for name in CA_VARIABLES if os.environ.get(name)), None)


def _find_token() -> Token | None:
    """In the order in which Ray looks.

    Raises:
        EnvironmentProblem: If a file was named that cannot be read.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or DEFAULT_FILE).expanduser()
    if not named and not path.exists():
        return None
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise EnvironmentProblem(f"the token's file {path} cannot be read: {reason}") from None
    return Token(value, str(path)) if value else None


def _asks_for_token(address: str) -> bool:
    url = f"{address}/api/authentication_mode"
    try:
        context = ssl.create_default_context(cafile=certificates())
        # The address is http or https: `checked_address` lets nothing else through.
        opened = urllib.request.urlopen(url, timeout=ANSWER_SECONDS, context=context)  # nosec B310
        with opened as answer:
            mode = json.load(answer)["authentication_mode"]
    except urllib.error.HTTPError as error:
        raise EnvironmentProblem(
            f"{address} does not answer like Ray's job server (HTTP {error.code}): give the "
            "address of the cluster's dashboard, of Ray 2.60"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentProblem(unreachable(address, error)) from None
    except (ValueError, KeyError, TypeError):
        raise EnvironmentProblem(
            f"{address} does not answer like Ray's job server: give the address of the cluster's "
            "dashboard, of Ray 2.60"
        ) from None
    return bool(mode != "disabled")


def unreachable(address: str, error: Exception) -> str:
    """The sentence about a job server that does not answer."""
    reason = getattr(error, "reason", None) or error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return f"{address} does not answer ({text}): check the address, and whether the cluster runs"
