"""Wrong input: the files of bad_studies and bad_trials, and the lines of bad_commands.

Comments at the head of a wrong study or trial give what is said of it (``says``) and what its
folder needs (``needs``: functions of `tests.bad_places`).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import yaml

TESTS = Path(__file__).parent
FILES = {"tune": TESTS / "bad_studies", "train": TESTS / "bad_trials"}
COMMANDS = TESTS / "bad_commands"
# Words of the catalogue: the folder that a command runs in; timm's version; a hash; any picture;
# sizes of this machine.
HERE, VERSION, DIGEST, PICTURE = "HERE", "VERSION", "DIGEST", "NN.png"
SIZE, MOST = "SIZE GiB", "at most N"
# Flags of a study that is right.
SMALL = "--data images --backbone test_efficientnet --weights weights.safetensors --image-size 32"


@dataclass(frozen=True)
class Example:
    """A command that is refused.

    Attributes:
        name: Its file, and its number there.
        arguments: Behind the program's name.
        stderr: What it must say, whole.
        file: The study or trial that its folder needs.
        needs: Functions of `tests.bad_places` that spoil its folder.
    """

    name: str
    arguments: list[str]
    stderr: str
    file: Path | None = None
    needs: list[str] = field(default_factory=list)

    def arguments_in(self, here: Path) -> list[str]:
        """The arguments in a folder."""
        return [argument.replace(HERE, str(here)) for argument in self.arguments]

    def in_its_words(self, text: str, here: Path) -> str:
        """What was said in a folder, as the catalogue writes it."""
        text = text.replace(str(here), HERE).replace(timm.__version__, VERSION)
        for word, pattern in (
            (DIGEST, r"\b[0-9a-f]{16}\b"),
            (PICTURE, r"\b\d\d\.png"),
            (SIZE, r"\b\d+\.\d GiB"),
            (MOST, r"at most \d+"),
        ):
            if word in self.stderr:
                text = re.sub(pattern, word, text)
        return text


def header(text: str, key: str) -> list[str]:
    """Values of a key among the comments of a file."""
    start = f"# {key}: "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def all_examples() -> list[Example]:
    """Every wrong study, trial and command line."""
    of_files = [
        _of_file(command, path)
        for command, folder in FILES.items()
        for path in sorted(folder.glob("*.yaml"))
    ]
    of_tables = [
        example
        for path in sorted(COMMANDS.glob("*.yaml"))
        for number, line in enumerate(yaml.safe_load(path.read_text()), 1)
        for example in _of_line(f"{path.stem}-{number}", line)
    ]
    return of_files + of_tables


def _of_file(command: str, path: Path) -> Example:
    text = path.read_text()
    name = f"{path.parent.name}/{path.stem}"
    said = "drtune-ray: " + "\n".join(header(text, "says")) + "\n"
    needs = " ".join(header(text, "needs")).split()
    return Example(name, [command, path.name], said, path, needs)


def _of_line(name: str, line: dict[str, Any]) -> list[Example]:
    """An example; ``each`` gives several, which differ in the word EACH.

    SMALL stands for the flags of a study that is right.
    """
    words = line.get("each", ["EACH"])
    return [
        Example(
            f"{name}{word}" if "each" in line else name,
            shlex.split(line["run"].replace("EACH", word).replace("SMALL", SMALL)),
            _stderr(line).replace("EACH", word),
            needs=line.get("needs", []),
        )
        for word in words
    ]


def _stderr(line: dict[str, Any]) -> str:
    """What stands on stderr: ``usage`` is there where click complains."""
    said = "\n".join(line["says"]) + "\n"
    if "usage" not in line:
        return f"drtune-ray: {said}"
    if not line["usage"]:
        return f"Error: {said}"
    usage = f"drtune-ray {line['usage']}"
    command = usage.split(" [")[0]
    return f"Usage: {usage}\nTry '{command} --help' for help.\n\nError: {said}"
