"""The README and the docs: their tree, links, commands, and the example of the method alone."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import nn

from drtune_ray.cli import cli
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def example() -> str:
    (block,) = re.findall(
        r"<!-- A test runs this block.*?```python\n(.*?)```", README.read_text(), re.S
    )
    return str(block)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_method_alone__runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    colours = torch.randn(10, 3, 1, 1)
    labels = torch.arange(10).repeat(8)
    images = colours[labels] + 0.3 * torch.randn(80, 3, 4, 4)
    loader = list(zip(images.split(20), labels.split(20), strict=True)) * 30
    encoder = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names: dict[str, Any] = {"encoder": encoder, "loader": loader}
    exec(compile(example(), str(README), "exec"), names)
    said = capsys.readouterr().out
    assert "distribution_regularization" in said
    assert "semantic_drift" in said
    assert "rotation_angle" in said
    method = names["method"]
    assert len(method.bank) == 1024
    with torch.no_grad():
        logits = names["head"](encoder(images))
    assert (logits.argmax(1) == labels).double().mean() > 0.8


def test_the_method_alone__is_short() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15


# ---- the tree


def tree() -> list[str]:
    """The paths that the README's tree names, folders with a slash at their end."""
    (block,) = re.findall(r"^## The tree\n.*?```\n(.*?)```", README.read_text(), re.M | re.S)
    paths: list[str] = []
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        above = [(depth, folder) for depth, folder in above if depth < indent]
        path = (above[-1][1] if above else "") + line.split()[0]
        if path.endswith("/"):
            above.append((indent, path))
        paths.append(path)
    return paths


def tracked() -> set[str]:
    """Every file of the repository, and every folder with a slash at its end."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = {Path(name) for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    folders = {f"{folder.as_posix()}/" for file in files for folder in file.parents[:-1]}
    return {file.as_posix() for file in files} | folders


def test_tree__what_it_names_exists() -> None:
    assert set(tree()) - tracked() == set()


def test_tree__names_every_folder_and_package() -> None:
    folders = {path for path in tracked() if path.endswith("/")}
    top = {path for path in folders if path.count("/") == 1 and not path.startswith(".")}
    packages = {path for path in folders if path.startswith("drtune_ray/")}
    modules = {path for path in tracked() if re.fullmatch(r"drtune_ray/\w+\.py", path)}
    assert (top | packages | modules) - {"drtune_ray/__init__.py"} - set(tree()) == set()


def test_tree__lines_import_only_from_lines_below() -> None:
    inside = [path.removeprefix("drtune_ray/") for path in tree() if path.startswith("drtune_ray/")]
    rooms = [re.sub(r"(/|\.py)$", "", path) for path in inside if path.count("/") < 2]
    rooms = [room for room in rooms if room and "/" not in room]
    assert set(rooms) == set(LAYERS)
    for place, room in enumerate(rooms):
        assert not LAYERS[room] & set(rooms[:place]), room


def test_six_files_to_read__exist() -> None:
    files = re.findall(r"^\d\. `(\S+)`: ", README.read_text(), re.M)
    assert len(files) == 6
    assert set(files) - tracked() == set()


# ---- links and commands


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links__lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page: Path) -> list[str]:
    """The calls of drtune-ray in the console blocks of a page, without prompts and comments."""
    text = "\n".join(re.findall(r"```console\n(.*?)```", page.read_text(), re.S))
    joined = text.replace("\\\n", " ")
    return re.findall(r"^(?:\w*\$ )?drtune-ray (.*)$", joined, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands__have_the_options_that_are_documented(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(re.split(r"\s[|>]\s", line)[0], comments=True)
        command: click.Command = cli
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_parser(click.Context(command)).parse_args(words)


def test_commands__are_found() -> None:
    assert len(commands(README)) >= 7
