"""Addresses of servers. They are recorded; the passwords in them are not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from pydantic import AfterValidator

from drtune_ray.errors import ConfigError


def without_password(uri: str) -> str:
    """Return the URI of a server unchanged if it holds no password.

    Raises:
        ValueError: If it holds one, or is not a valid address.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ValueError(
            f"it is not a valid address ({error}): write SCHEME://HOST:PORT/PATH"
        ) from None
    secrets = {"the password": parts.password or ""}
    secrets |= {f"the value of {k!r}": v for k, v in parse_qsl(parts.query) if _is_secret(k)}
    if parts.scheme in TOKEN_AS_USER and not parts.password:
        secrets["the user, who may be a token,"] = parts.username or ""
    if parts.scheme.partition("+")[0] not in OF_FILES:
        secrets["the part behind #, which may be a token,"] = parts.fragment
    for what, secret in secrets.items():
        if secret and not _REFERENCE.fullmatch(secret):
            raise ValueError(
                f"{what} would be recorded with the study: write $NAME in its place, and put "
                f"{what} into the environment variable NAME"
            )
    return uri


_REFERENCE = re.compile(r"\$(\w+)|\$\{(\w+)\}")
_SECRET_OPTION = re.compile(
    r"secret|token|key|sig|credential|pass|pwd|auth|bearer|jwt|(?<![a-z])code(?![a-z])",
    re.IGNORECASE,
)
# Options of libpq, PyMySQL and curl that hold paths or methods, not secrets.
_PLAIN_OPTIONS = ("sslkey", "ssl_key", "passfile", "sslkeylogfile", "require_auth", "auth_plugin")
# Servers to which a user without a password is a token or a key; a database has users.
TOKEN_AS_USER = ("http", "https", "s3", "gs", "gcs")
OF_FILES = ("sqlite", "file")  # a path may hold #


def _is_secret(option: str) -> bool:
    return bool(_SECRET_OPTION.search(option)) and option.lower() not in _PLAIN_OPTIONS


ServerUri = Annotated[str, AfterValidator(without_password)]


def with_secrets(uri: str) -> str:
    """Replace each ``$NAME`` of a URI by the environment variable's value, for connecting only.

    Raises:
        ConfigError: If a variable is not set.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ConfigError(f"{uri} needs the environment variable {name}: set it")
        # A password may contain characters that a part of a URI may not.
        return os.environ[name] if found[0] == uri else quote(os.environ[name], safe="")

    return _REFERENCE.sub(value, uri)


def names_in(uri: str) -> tuple[str, ...]:
    """Return the names of the environment variables that :func:`with_secrets` needs."""
    return tuple(dict.fromkeys(found[1] or found[2] for found in _REFERENCE.finditer(uri)))


def without_secrets(text: str, uri: str | None) -> str:
    """Replace secret values in a text by their ``$NAME``, so that it may be shown.

    Args:
        text: Text of another program, such as a connection error.
        uri: URI of the server as given to :func:`with_secrets`.
    """
    names = _names_of_values(uri or "")
    if not names:
        return text
    longest_first = sorted(names, key=len, reverse=True)
    values = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE)
    return values.sub(lambda found: names.get(found[0].lower(), "$..."), text)


def _names_of_values(uri: str) -> dict[str, str]:
    """Map each form in which a secret value may appear, in lower case, to its ``$NAME``."""
    names: dict[str, str] = {}
    for found in _REFERENCE.finditer(uri):
        name = found[1] or found[2]
        values = [os.environ.get(name, "")]
        if found[0] == uri:  # the value is an address with a password in it
            password = urlsplit(values[0]).password or ""
            values += [password, unquote(password)]
        for value in filter(None, values):
            # Verbatim, quoted in a URI, and escaped in a string literal.
            forms = (value, quote(value, safe=""), quote(value), quote_plus(value))
            names |= {form.lower(): f"${name}" for form in (*forms, repr(value)[1:-1])}
    return names


@contextmanager
def secrets_hidden(uri: str | None) -> Iterator[None]:
    """Replace secret values by ``$NAME`` in errors raised within, and in their causes.

    The errors are changed in place, since they go to logs with their tracebacks, to other
    processes and to the records of trials.
    """
    try:
        yield
    except Exception as error:
        _hide(error, uri, set())
        raise


def _hide(error: BaseException | None, uri: str | None, seen: set[int]) -> None:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    for part in (error.__cause__, error.__context__, *error.args):
        if isinstance(part, BaseException):
            _hide(part, uri, seen)
    # `OSError` prints these, not its `args`; errors of libraries keep text in any attribute.
    for name in ("strerror", "filename", "filename2", *getattr(error, "__dict__", ())):
        held = getattr(error, name, None)
        if isinstance(held, str):
            with suppress(AttributeError):
                setattr(error, name, without_secrets(held, uri))
    error.args = tuple(
        without_secrets(part, uri) if isinstance(part, str) else part for part in error.args
    )
