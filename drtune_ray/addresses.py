"""Addresses of servers, which are recorded, without the passwords, which are not."""

from __future__ import annotations

import os
import re
from typing import Annotated
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import AfterValidator

from drtune_ray.errors import ConfigError


def without_password(uri: str) -> str:
    """The URI of a server, if it may be recorded and shown.

    Raises:
        ValueError: If it may not.
    """
    parts = urlsplit(uri)
    secrets = [parts.password or "", *(v for k, v in parse_qsl(parts.query) if "pass" in k.lower())]
    if any(secret and not _REFERENCE.fullmatch(secret) for secret in secrets):
        raise ValueError(
            "the password would be recorded with the study: write $NAME in its place, and put the "
            "password into the environment variable NAME"
        )
    return uri


_REFERENCE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


ServerUri = Annotated[str, AfterValidator(without_password)]


def with_secrets(uri: str) -> str:
    """The URI of a server with the environment's values for each ``$NAME``, for connecting only.

    Raises:
        ConfigError: If one is not set.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ConfigError(f"{uri} needs the environment variable {name}: set it")
        # Any character may stand in a password, but not in a part of a URI.
        return os.environ[name] if found[0] == uri else quote(os.environ[name], safe="")

    return _REFERENCE.sub(value, uri)
