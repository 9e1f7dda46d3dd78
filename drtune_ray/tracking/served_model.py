"""The class by which MLflow loads and serves a model.

MLflow copies this file into each model that is logged and runs it when the model is loaded: nothing
is pickled.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

import drtune_ray

IMAGE = "image"


class ImageClassifier(PythonModel):
    """Classifies the images of the column `image`."""

    def load_context(self, context: Any) -> None:
        """Load the model from its folder among the artifacts."""
        self._model = drtune_ray.load(context.artifacts["winner"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Return label, probability and all probabilities for each row.

        Args:
            context: Unused.
            model_input: Data frame with a column `image`: encoded images (JPEG, PNG, ...) as bytes
                or in base64, or uint8 pixels (H, W, 3) as an array or as nested lists.
            params: Unused.

        Raises:
            MlflowException: If a row holds no image; a server then answers with code 400.
        """
        try:
            found = self._model.predict([_image(value) for value in model_input[IMAGE]])
        except (ValueError, TypeError, OverflowError, KeyError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pd.DataFrame(
            {
                "label": [each.label for each in found],
                "probability": [each.probability for each in found],
                "probabilities": [each.probabilities for each in found],
            }
        )


def _image(value: Any) -> Any:
    """Return bytes or an array; a text is never taken for the path of a file."""
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the text in column {IMAGE!r} is not base64 ({error})") from None
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    pixels = np.asarray(value)
    if pixels.dtype.kind in "iu" and pixels.size and 0 <= pixels.min() <= pixels.max() <= 255:
        return pixels.astype(np.uint8)
    raise ValueError(
        f"column {IMAGE!r} takes bytes, base64, or whole numbers of 0 to 255 of shape (H, W, 3), "
        f"but got {pixels.dtype} of shape {pixels.shape}"
    )


set_model(ImageClassifier())
