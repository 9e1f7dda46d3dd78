from __future__ import annotations

import traceback

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.server_uri import (
    names_in,
    secrets_hidden,
    with_secrets,
    without_password,
    without_secrets,
)

SECRET = "s3/cr:et"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", SECRET)


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("postgresql://me:abc@host/db", "the password"),
        ("postgresql://host/db?password=abc", "the value of 'password'"),
        ("https://host?client_secret=abc", "the value of 'client_secret'"),
        ("https://host?Token=abc", "the value of 'Token'"),
        ("https://host/x?sv=1&sig=abc%2F", "the value of 'sig'"),
        ("abfss://c@account/p?account_key=abc", "the value of 'account_key'"),
        ("s3://bucket?X-Amz-Credential=abc", "the value of 'X-Amz-Credential'"),
        ("mssql://host?PWD=abc", "the value of 'PWD'"),
        ("https://me:$PW@host?token=abc", "the value of 'token'"),
        ("https://host?token=x$PW", "the value of 'token'"),
        ("https://host?auth=abc", "the value of 'auth'"),
        ("https://host?Authorization=abc", "the value of 'Authorization'"),
        ("https://host?bearer=abc", "the value of 'bearer'"),
        ("https://host/api?code=abc", "the value of 'code'"),
        ("https://host/api?device_code=abc", "the value of 'device_code'"),
        ("https://abc@host", "the user, who may be a token,"),
        ("s3://abc@bucket/prefix", "the user, who may be a token,"),
        ("https://host/#access_token=abc", "the part behind #, which may be a token,"),
    ],
)
def test_without_password__refused(uri: str, what: str) -> None:
    with pytest.raises(ValueError) as caught:
        without_password(uri)
    assert str(caught.value) == (
        f"{what} would be recorded with the study: write $NAME in its place, and put {what} into "
        "the environment variable NAME"
    )


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:$PW@host/db",
        "postgresql://me@host/db?password=${PW}&client_secret=$PW",
        "postgresql://host/db?sslmode=verify-full&sslkey=/keys/my.key&passfile=/home/me/.pgpass",
        "mysql+pymysql://host/db?ssl_key=/keys/my.key",
        "s3://bucket/prefix?region=eu-west-1&endpoint_override=host:9000",
        "postgresql://host/db?keepalives=1&client_encoding=utf8&require_auth=scram-sha-256",
        "https://$PW@host",
        "https://host#$PW",
        "abfss://container@account.dfs.core.windows.net/prefix",
        "sqlite:////data/a#b.db",
        "file:///mnt/token=1",
    ],
)
def test_without_password__allowed(uri: str) -> None:
    assert without_password(uri) == uri


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("to http://me:s3%2Fcr%3Aet@host/x failed", "to http://me:$PW@host/x failed"),
        ("to http://me:s3%2fcr%3aet@host/x failed", "to http://me:$PW@host/x failed"),
        (f"password {SECRET!r} is wrong", "password '$PW' is wrong"),
        ("host S3/CR:ET is not known", "host $PW is not known"),
        ("s3/cr%3Aet", "$PW"),
        ("nothing of it", "nothing of it"),
    ],
)
def test_without_secrets__every_form(text: str, shown: str) -> None:
    assert without_secrets(text, "http://me:$PW@host") == shown


def test_without_secrets__several_and_one_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONG", "me-and-more")
    monkeypatch.setenv("SHORT", "me")
    monkeypatch.setenv("EMPTY", "")
    uri = "http://$SHORT:$LONG@host?token=$EMPTY&key=$NOT_SET"
    assert without_secrets("me:me-and-more", uri) == "$SHORT:$LONG"
    assert without_secrets("me", None) == without_secrets("me", "http://host") == "me"


def test_without_secrets__the_value_is_a_whole_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE", "postgresql://me:p%40ss@host/db")
    assert with_secrets("$DATABASE") == "postgresql://me:p%40ss@host/db"
    assert without_secrets("p@ss, p%40ss", "$DATABASE") == "$DATABASE, $DATABASE"


class Odd(Exception):
    """Shows what it keeps elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"no {SECRET}"),
        OSError(2, "not found", f"/{SECRET}"),
        OSError(f"no {SECRET}"),
        Odd(f"no {SECRET}"),
        RuntimeError(ValueError(f"no {SECRET}")),
        KeyError(),
    ],
    ids=repr,
)
def test_secrets_hidden__errors_and_what_they_came_from(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, secrets_hidden("http://me:$PW@host"):
        try:
            try:
                raise ValueError(f"first: {SECRET}")
            except ValueError:
                raise LookupError(f"then: {SECRET}")  # noqa: B904
        except LookupError as cause:
            raise error from cause
    assert caught.value is error
    assert caught.value.__cause__ is not None
    assert "then: $PW" in str(caught.value.__cause__)
    # Pytest's own rendering of the source aside: what a log's traceback says of the errors.
    shown = traceback.TracebackException.from_exception(error)
    while shown is not None:
        assert SECRET not in "".join(shown.format_exception_only())
        shown = shown.__cause__ or shown.__context__


def test_with_secrets__not_set() -> None:
    with pytest.raises(ConfigError, match="needs the environment variable NOT_SET: set it"):
        with_secrets("http://me:$NOT_SET@host")


def test_names_in__each_once() -> None:
    assert names_in("postgresql://$USER:${PW}@host/db?password=$PW") == ("USER", "PW")
    assert names_in("$URL") == ("URL",)
    assert names_in("s3://bucket/prefix") == ()
