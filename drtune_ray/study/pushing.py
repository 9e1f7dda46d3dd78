"""Copying the package of a model to where others find it: a folder, or a repository of a hub."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from drtune_ray.errors import ConfigError, EnvironmentProblem, first_line
from drtune_ray.folders import files_as_problem, flush
from drtune_ray.results.package import SUMS_NAME
from drtune_ray.results.places import model_folder
from drtune_ray.results.winner import is_sound

HUB = "hf://"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@files_as_problem()
def push_model(model: str, target: str, storage: str, *, is_private: bool = True) -> str:
    """Copy the package of a model; return where it lies now.

    Args:
        model: Name of a study or training, its folder, or a model's folder.
        target: A folder, which must be new, empty or an earlier copy; or ``hf://OWNER/NAME``.
        storage: Folder of the studies.
        is_private: Whether a repository that is made is private.

    Raises:
        ConfigError: If there is no such model, or the target is not valid.
        EnvironmentProblem: If the model is damaged, or the hub does not take it.
    """
    folder = model_folder(model, storage)
    if not is_sound(folder):
        raise EnvironmentProblem(
            f"{folder} holds no whole model: repeat the command that trained it, which writes it "
            "again"
        )
    if target.startswith(HUB):
        return _to_hub(folder, target, is_private=is_private)
    if "://" in target:
        raise ConfigError(f"target {target!r} is not valid: give a folder, or {HUB}OWNER/NAME")
    return _to_folder(folder, Path(target).absolute())


def _to_folder(folder: Path, target: Path) -> str:
    """Copy a package into a folder, which has all of its files or those of before."""
    if target.exists() and not target.is_dir():
        raise ConfigError(f"target {target} is a file: give a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / SUMS_NAME).exists():
        raise ConfigError(
            f"target {target} holds other files: give a new folder, or that of an earlier push"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(folder, temporary)
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(target)


def _to_hub(folder: Path, target: str, *, is_private: bool) -> str:
    """Upload a package in one commit."""
    name = target.removeprefix(HUB)
    if not REPOSITORY.fullmatch(name):
        raise ConfigError(f"target {target!r} is not valid: write it {HUB}OWNER/NAME")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(name, private=is_private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="model")
    except LocalTokenNotFoundError:
        raise EnvironmentProblem(
            f"{api.endpoint} asks who you are: put a token into HF_TOKEN, or run `hf auth login`"
        ) from None
    except Exception as error:  # of the HTTP library, which differs between releases
        raise EnvironmentProblem(
            f"{api.endpoint} does not take {name} ({first_line(error)}): check the name, HF_TOKEN "
            "and its rights, and the network"
        ) from None
    return str(commit.commit_url)
