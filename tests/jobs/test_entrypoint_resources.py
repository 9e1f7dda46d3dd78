from __future__ import annotations

import pytest

from drtune_ray.errors import ConfigError
from drtune_ray.jobs.submission import custom_resources


def test_custom_resources() -> None:
    assert custom_resources(None) == {}
    assert custom_resources('{"trial_driver": 1, "spot": 0.5}') == {"trial_driver": 1, "spot": 0.5}


@pytest.mark.parametrize("text", ["x=1", "[1]", '{"x": "1"}', '{"x": true}', '{"x": 0}'])
def test_custom_resources__refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        custom_resources(text)
    assert str(caught.value).startswith(f"--entrypoint-resources {text!r} must be ")
    assert str(caught.value).endswith("like '{\"trial_driver\": 1}'")
