"""``--help`` as a new user reads it: each text stands alone, and settings have their own text."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from drtune_ray.cli import cli
from drtune_ray.cli.options import FITTED, SettingOption
from drtune_ray.config.settings_page import described, field_at
from drtune_ray.config.sources import STUDY_FLAGS, TRIAL_FLAGS
from drtune_ray.config.study import StudyConfig
from drtune_ray.study.machine import Machine, fitting_defaults
from drtune_ray.values import flattened
from tests.config.test_settings_page import NOT_ALONE


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def context(path: tuple[str, ...]) -> click.Context:
    found = click.Context(cli, info_name="drtune-ray")
    for name in path:
        assert isinstance(found.command, click.Group)
        found = click.Context(found.command.commands[name], found, name)
    return found


def help_of(path: tuple[str, ...]) -> str:
    done = CliRunner().invoke(cli, [*path, "--help"], prog_name="drtune-ray")
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("path", [(), *commands(cli)], ids=" ".join)
def test_help__each_text_stands_alone(path: tuple[str, ...]) -> None:
    found = context(path)
    texts = [found.command.help or ""]
    for option in found.command.params:
        if isinstance(option, click.Option):
            texts.append((option.get_help_record(found) or ("", ""))[1])
    assert [text for text in texts if not re.match("[A-Z]", text) or NOT_ALONE.match(text)] == []


@pytest.mark.parametrize("command", ["tune", "preview", "submit", "train", "doctor"])
def test_help__of_a_setting_is_its_field(command: str) -> None:
    paths = {name: f"trial.{path}" for name, path in TRIAL_FLAGS.items()} | STUDY_FLAGS
    text = help_of((command,))
    found = context((command,)).command.params
    settings = [option for option in found if isinstance(option, SettingOption)]
    assert len(settings) >= 7
    for option in settings:
        sentence = described(field_at(StudyConfig, paths[str(option.name)]))[0].split(". ")[0]
        assert sentence.replace("`", "").rstrip(".") in text.replace("- ", "-"), option.name


def test_help__choices_and_defaults() -> None:
    text = help_of(("tune",))
    assert "--sampler [tpe|gp|cma_es|qmc|random|nsga2|nsga3]" in text
    assert "trained; 0 holds no finals. [default: 2]" in text
    assert "the data folder's name. --seed" in text  # without a default of its own
    assert "object store. --backbone" in text  # required
    assert "May be repeated. --tracking-uri" in text


def test_fitted__are_the_defaults_for_the_machine() -> None:
    paths = {path: name for name, path in STUDY_FLAGS.items()}
    paths |= {f"trial.{path}": name for name, path in TRIAL_FLAGS.items()}
    fitted: set[str] = set()
    for num_gpus in (0, 1):
        for path, value in flattened(fitting_defaults(Machine(8, num_gpus))).items():
            default = field_at(StudyConfig, path).default
            fitted |= {paths[path]} if path in paths and value != default else set()
    assert fitted <= set(FITTED) <= {paths[path] for path in paths}


def test_help__a_required_option_says_so() -> None:
    assert "job server, http(s)://HOST:PORT. [required]" in help_of(("submit",))
