"""The Ray Serve application that answers with predictions: batches, a token, a health check.

``build`` is what a RayService imports; `serving` runs the same application on this machine.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import os
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse

from drtune_ray.config.section import Section, validated
from drtune_ray.errors import ConfigError
from drtune_ray.execution.serving import DEPLOYMENT, TOKEN_VARIABLE
from drtune_ray.results.predict import Prediction, Unreadable, load

MAX_BODY_BYTES = 64 * 2**20
Answer = tuple[dict[str, Any], int]


class ServeArguments(Section):
    """Arguments of the application, as a RayService gives them."""

    model: str
    """Model as `predict` takes it; every node reads it at the same path."""

    tracking_uri: str | None = None
    """MLflow's tracking URI, for a model of its registry."""

    requires_token: bool = True
    """Whether requests need the token of DRTUNE_SERVE_TOKEN."""

    batch_size: int = 32
    """Most images that go through the model at a time."""

    batch_wait_ms: float = 5.0
    """Time that the first image of a batch waits for others, in milliseconds."""

    num_replicas: int = 1
    """Number of copies of the model."""

    num_cpus: float = 1.0
    """CPUs of a replica, which are also its threads."""

    num_gpus: float = 0.0
    """GPUs of a replica."""


@serve.deployment(name=DEPLOYMENT, health_check_period_s=15, health_check_timeout_s=60)
class ImageService:
    """Answers requests with the predictions for their images.

    Args:
        arguments: Plain values of `ServeArguments`.
        token_sha256: Digest of the token that requests need; None lets everyone in.
    """

    def __init__(self, arguments: dict[str, Any], token_sha256: str | None) -> None:
        known = ServeArguments(**arguments)
        self._token_sha256 = token_sha256
        self._model = load(
            known.model, tracking_uri=known.tracking_uri, batch_size=known.batch_size
        )
        batching: Any = self._predict
        batching.set_max_batch_size(known.batch_size)
        batching.set_batch_wait_timeout_s(known.batch_wait_ms / 1000)
        self.check_health()

    def check_health(self) -> None:
        """Classify a black image: a replica that raises is replaced."""
        self._model.predict(np.zeros((8, 8, 3), np.uint8))

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer a request: an image file, or JSON with images in base64."""
        if not self._is_allowed(request.headers.get("authorization", "")):
            headers = {"WWW-Authenticate": "Bearer"}
            return JSONResponse({"error": "give the token"}, 401, headers=headers)
        if request.method != "POST":
            return JSONResponse({"error": "send images by POST"}, 405, headers={"Allow": "POST"})
        body = await _body(request)
        if body is None:
            return JSONResponse({"error": f"more than {MAX_BODY_BYTES} bytes"}, 413)
        is_json = request.headers.get("content-type", "").startswith("application/json")
        return JSONResponse(*await (self._answer_json(body) if is_json else self._answer(body)))

    async def _answer(self, body: bytes) -> Answer:
        found = await self._predict(body)
        return found, 400 if "error" in found else 200

    async def _answer_json(self, body: bytes) -> Answer:
        try:
            texts = json.loads(body)["images"]
            images = [base64.b64decode(text, validate=True) for text in texts]
        except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
            return {"error": 'send {"images": [...]}, each an image file in base64'}, 400
        found = await asyncio.gather(*(self._predict(image) for image in images))
        return {"predictions": found}, 200

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def _predict(self, images: list[bytes]) -> list[dict[str, Any]]:
        """Classify the images of several requests together."""
        return await asyncio.to_thread(lambda: [_plain(e) for e in self._model.stream(images)])

    def _is_allowed(self, authorization: str) -> bool:
        if self._token_sha256 is None:
            return True
        scheme, _, token = authorization.partition(" ")
        is_same = hmac.compare_digest(token_digest(token.strip()), self._token_sha256)
        return scheme.lower() == "bearer" and is_same


async def _body(request: Request) -> bytes | None:
    """Return the body of a request, None if it is too long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)


def _plain(found: Prediction | Unreadable) -> dict[str, Any]:
    if isinstance(found, Unreadable):
        return {"error": found.reason}
    return {
        "label": found.label,
        "probability": found.probability,
        "probabilities": found.probabilities,
    }


def token_digest(token: str) -> str:
    """Return the digest by which replicas know a token, which itself no record of Ray holds."""
    return hashlib.sha256(token.encode()).hexdigest()


def build(arguments: dict[str, Any]) -> Application:
    """Return the application; a RayService calls this on the cluster.

    Args:
        arguments: Plain values of `ServeArguments`.

    Raises:
        ConfigError: If an argument is not valid, or a token is required and none is set.
    """
    known = validated(ServeArguments, arguments, "args.")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if known.requires_token and not token:
        raise ConfigError(
            f"{TOKEN_VARIABLE} is not set, and without it everyone who reaches the port may ask: "
            "set it to a secret of your choice"
        )
    options = {"num_cpus": known.num_cpus, "num_gpus": known.num_gpus}
    service: Any = ImageService
    sized = service.options(
        num_replicas=known.num_replicas,
        # A batch is collected from the requests that a replica works on.
        max_ongoing_requests=4 * known.batch_size,
        ray_actor_options=options,
    )
    digest = token_digest(token) if token else None
    application: Application = sized.bind(known.model_dump(), digest)
    return application
