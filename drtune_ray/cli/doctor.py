"""The command ``drtune-ray doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drtune_ray.cli.options import (
    DEFAULT_STORAGE,
    artifacts_option,
    backbone_option,
    data_option,
    tracking_uri_option,
    weights_option,
)

if TYPE_CHECKING:
    from drtune_ray.doctor.examine import Setup


@click.command()
@click.argument("study_file", required=False, type=click.Path(path_type=Path))
@click.option("--address", help="HOST:PORT of a Ray cluster's head; by default RAY_ADDRESS.")
@click.option("--storage", help=f"Folder for everything written.  [default: {DEFAULT_STORAGE}]")
@tracking_uri_option
@artifacts_option
@click.option("--optuna-storage", help="URL of a database.")
@data_option
@backbone_option
@weights_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a check (docs/json.md).")
def doctor(study_file: Path | None, address: str | None, as_json: bool, **flags: Any) -> None:
    """Look at cluster, servers and files before a study needs them; what tune takes goes here.

    A line a check. Where one fails, the others go on and the exit code is 3. Without an address a
    Ray is started on this machine, as tune would. Of a study file, or of --data, the images, the
    weights and the room for a trial are looked at too.
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
    """What the options name."""
    from drtune_ray.doctor.examine import named_setup, study_setup
    from drtune_ray.study.resolve import study_request

    if study_file is not None or flags["data_folder"]:
        return study_setup(study_request(study_file, (), flags)[0], address)
    return named_setup(
        {"storage": DEFAULT_STORAGE} | {k: v for k, v in flags.items() if v}, address
    )
