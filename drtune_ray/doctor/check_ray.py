"""Check that a Ray cluster accepts this machine, and which of its services answer."""

from __future__ import annotations

import os
from pathlib import Path

from drtune_ray.doctor.findings import Doubt
from drtune_ray.errors import EnvironmentProblem
from drtune_ray.execution.capacity import Capacity
from drtune_ray.execution.placement_groups import check_state_api
from drtune_ray.execution.session import check_address

ANSWER_SECONDS = 10.0
OTHERS_MAY_READ = 0o077
COPY = "copy ~/.ray/auth_token of the head node to this machine"
OPEN = (
    "the cluster requires no token: anyone who can reach its ports can run code on it; start it "
    "with RAY_AUTH_MODE=token (`ray get-auth-token --generate` creates a token)"
)


def check_reachable(address: str) -> str:
    """Check that something listens at an address.

    Raises:
        EnvironmentProblem: If not.
    """
    try:
        check_address(address)
    except ConnectionError as error:
        raise EnvironmentProblem(f"{address}: {error}") from None
    return f"{address} answers"


def check_token(address: str) -> str:
    """Check that the cluster accepts this machine's token, without Ray, which takes 20 s.

    Args:
        address: HOST:PORT of the cluster's head.

    Raises:
        Doubt: If the cluster accepts requests without a token, or other users can read it.
        EnvironmentProblem: If it rejects the token.
    """
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        raise Doubt("not checked where Ray uses TLS: joining the cluster will show it")
    token, source = _own_token()
    if _refuses(address, token):
        if token:
            raise EnvironmentProblem(f"the cluster rejects the token from {source}: {COPY}")
        raise EnvironmentProblem(
            f"the cluster requires a token, and none is sent: set RAY_AUTH_MODE=token, and {COPY}"
        )
    if not _refuses(address, None):
        raise Doubt(OPEN)
    _check_private(source)
    return f"the token from {source} is accepted, requests without a token are refused"


def check_dashboard() -> str:
    """Check that the State API answers.

    Raises:
        EnvironmentProblem: If not.
    """
    check_state_api()
    return "answers"


def described(capacity: Capacity) -> str:
    """Describe the cluster in one line."""
    import ray

    return f"Ray {ray.__version__}: {capacity}"


def _check_private(source: str) -> None:
    """Raise `Doubt` if other users can read the file that holds the token."""
    path = Path(source)  # or a variable, which is no file
    if path.is_file() and path.stat().st_mode & OTHERS_MAY_READ:
        raise Doubt(
            f"the token is accepted, but other users can read {path}, and who has the token can "
            f"run code on the cluster: `chmod go= {path}` restricts it to you"
        )


def _own_token() -> tuple[str, str]:
    """Return the token that Ray sends from here, "" if none, and its source.

    Raises:
        EnvironmentProblem: If Ray is set to send one and there is none.
    """
    from drtune_ray.execution.ray_state import sends_token, token_of_this_machine

    if not sends_token():
        return "", ""
    token = token_of_this_machine()
    if token is None:
        raise EnvironmentProblem(
            "RAY_AUTH_MODE=token is set, but there is no token in RAY_AUTH_TOKEN, in the file of "
            f"RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token: {COPY}"
        )
    return token, _source()


def _source() -> str:
    """Return the source of Ray's token, in Ray's order of precedence."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    from drtune_ray.execution.ray_state import token_file

    return str(token_file())


def _refuses(address: str, token: str | None) -> bool:
    """Return whether the cluster's head refuses a request with this token.

    Raises:
        EnvironmentProblem: If the address does not answer as a head node.
    """
    from drtune_ray.execution.ray_state import head_refuses

    try:
        return head_refuses(address, token, ANSWER_SECONDS)
    except ConnectionError as error:
        raise EnvironmentProblem(
            f"{address} does not answer as the head of a Ray cluster ({error}): "
            "give the address that `ray start --head` prints"
        ) from None
