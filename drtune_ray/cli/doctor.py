"""The command ``drtune-ray doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drtune_ray.cli.options import (
    DEFAULT_STORAGE,
    SettingOption,
    artifacts_option,
    backbone_option,
    data_option,
    optuna_storage_option,
    tracking_uri_option,
    weights_option,
)

if TYPE_CHECKING:
    from drtune_ray.doctor.examine import Setup


@click.command()
@click.argument("study_file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Address of a Ray cluster's head. Default: the environment variable RAY_ADDRESS.",
)
@click.option("--storage", cls=SettingOption, metavar="DIR")
@tracking_uri_option
@artifacts_option
@optuna_storage_option
@data_option
@backbone_option
@weights_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per check (docs/json.md)."
)
def doctor(study_file: Path | None, address: str | None, as_json: bool, **flags: Any) -> None:
    """Check cluster, servers and files before a study.

    Takes options of tune. Prints one line per check. If a check fails, the others still run and the
    exit code is 3. Without --address, Ray is started on this machine, as tune does. With a study
    file or --data, the images, the weights and the resources of a trial are checked as well.
    """
    from drtune_ray.display.outputs import json_stdout, write_json
    from drtune_ray.doctor.examine import examine
    from drtune_ray.doctor.findings import Finding

    with json_stdout(is_wanted=as_json) as stream:

        def tell(finding: Finding) -> None:
            if as_json:
                facts = {"check": finding.check, "state": finding.state, "text": finding.text}
                write_json(stream, "check", facts)
            else:
                state = finding.state.upper() if finding.state == "failed" else finding.state
                click.echo(f"{state:<8} {finding.check}: {finding.text}")

        examine(_setup(study_file, address, flags), tell)
        if as_json:
            write_json(stream, "result", {"exit_code": 0, "reason": "done"})


def _setup(study_file: Path | None, address: str | None, flags: dict[str, Any]) -> Setup:
    """Return the setup that the options name."""
    from drtune_ray.doctor.examine import named_setup, study_setup
    from drtune_ray.study.resolve import study_request

    if study_file is not None or flags["data_folder"]:
        return study_setup(study_request(study_file, (), flags, needs_images=False)[0], address)
    return named_setup(
        {"storage": DEFAULT_STORAGE} | {k: v for k, v in flags.items() if v}, address
    )
