"""Whether a Ray cluster lets this machine in, and what of it answers."""

from __future__ import annotations

import os
from pathlib import Path

from drtune_ray.doctor.findings import Doubt
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Capacity
from drtune_ray.execution.placement_groups import check_state_api
from drtune_ray.execution.session import check_address

ANSWER_SECONDS = 10.0
COPY = "copy ~/.ray/auth_token of the head node to this machine"
OPEN = (
    "the cluster asks for no token: whoever reaches its ports can run code on it; start it with "
    "RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes one)"
)


def check_reachable(address: str) -> str:
    """Whether something listens there.

    Raises:
        EnvironmentProblem: If not.
    """
    try:
        check_address(address)
    except ConnectionError as error:
        raise EnvironmentProblem(f"{address}: {error}") from None
    return f"{address} answers"


def check_token(address: str) -> str:
    """Whether the cluster takes this machine's token, asked of it directly: Ray needs 20 s for it.

    Args:
        address: HOST:PORT of the cluster's head.

    Raises:
        Doubt: If the cluster takes anyone.
        EnvironmentProblem: If it does not take the token.
    """
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        raise Doubt("not looked at where Ray uses TLS: joining it tells")
    token, source = _own_token()
    if _refuses(address, token):
        if token:
            raise EnvironmentProblem(f"the cluster refuses the token of {source}: {COPY}")
        raise EnvironmentProblem(
            f"the cluster asks for a token, and none is sent: set RAY_AUTH_MODE=token, and {COPY}"
        )
    if not _refuses(address, None):
        raise Doubt(OPEN)
    return f"the token of {source} is accepted, and nobody is without one"


def check_dashboard() -> str:
    """Whether the State API answers.

    Raises:
        EnvironmentProblem: If not.
    """
    check_state_api()
    return "answers"


def described(capacity: Capacity) -> str:
    """The cluster in a line."""
    import ray

    return f"Ray {ray.__version__}: {capacity}"


def _own_token() -> tuple[str, str]:
    """The token that Ray sends from here, "" for none, and where it comes from.

    Raises:
        EnvironmentProblem: If Ray is to send one and there is none.
    """
    from drtune_ray.execution.ray_state import sends_token, token_of_this_machine

    if not sends_token():
        return "", ""
    token = token_of_this_machine()
    if token is None:
        raise EnvironmentProblem(
            "RAY_AUTH_MODE=token, and no token is in RAY_AUTH_TOKEN, in the file of "
            f"RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token: {COPY}"
        )
    return token, _source()


def _source() -> str:
    """Where Ray takes the token from, in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path("~/.ray/auth_token").expanduser())


def _refuses(address: str, token: str | None) -> bool:
    """Whether the cluster's head refuses a request with this token.

    Raises:
        EnvironmentProblem: If it answers something else.
    """
    from drtune_ray.execution.ray_state import head_refuses

    try:
        return head_refuses(address, token, ANSWER_SECONDS)
    except ConnectionError as error:
        raise EnvironmentProblem(
            f"{address} does not answer as the head of a Ray cluster ({error}): "
            "give the address that `ray start --head` says"
        ) from None
