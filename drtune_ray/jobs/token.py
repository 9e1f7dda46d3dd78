"""Find the token for a job server, in the order that Ray uses.

Ray's own client sends the token only if ``RAY_AUTH_MODE=token`` was set before Ray was imported.
Here a request without secrets finds out whether the server requires a token; only then is it sent.
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
# Variables for files of certificate authorities: of Python, and of requests in Ray's client.
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True)
class Token:
    """A token that allows its user to run code on a cluster.

    Attributes:
        value: The secret.
        source: The variable or file that held it.
    """

    value: str = field(repr=False)
    source: str


def needed_token(address: str) -> Token | None:
    """Return the token for a job server, None if it requires none.

    Args:
        address: Address of the server.

    Raises:
        EnvironmentProblem: If it does not answer, or requires a token and none is found.
    """
    if not _requires_token(address):
        return None
    if (token := _find_token()) is None:
        raise EnvironmentProblem(
            f"{address} requires a token, and none was found here: copy {DEFAULT_FILE} of the "
            "cluster to this machine, set RAY_AUTH_TOKEN_PATH to a copy, or put the token into "
            "RAY_AUTH_TOKEN. Nothing was sent"
        )
    return token


def certificates() -> str | None:
    """Return the user's file of certificate authorities; None means those of the system."""
    return next((os.environ[name] for name in CA_VARIABLES if os.environ.get(name)), None)


def _find_token() -> Token | None:
    """Look for a token in the order that Ray uses.

    Raises:
        EnvironmentProblem: If the token file cannot be read.
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
        reason = getattr(error, "strerror", None) or "it is not text"
        raise EnvironmentProblem(f"the token file {path} cannot be read: {reason}") from None
    return Token(value, str(path)) if value else None


def _requires_token(address: str) -> bool:
    url = f"{address}/api/authentication_mode"
    try:
        context = ssl.create_default_context(cafile=certificates())
        # The address is http or https: `checked_address` allows nothing else.
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
    """Return the message about a job server that does not answer."""
    reason = getattr(error, "reason", None) or error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return f"{address} does not answer ({text}): check the address, and that the cluster is running"
