"""YAML as people write it for ``kubectl``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and repeats what is the same object."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_documents(objects: Iterable[Mapping[str, Any]]) -> str:
    """One YAML document an object, in the order of their keys."""
    return yaml.dump_all(map(dict, objects), Dumper=_Dumper, sort_keys=False, explicit_start=True)
