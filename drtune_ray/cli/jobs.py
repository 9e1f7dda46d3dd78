"""Commands for jobs on a remote cluster: parse, call one function, print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drtune_ray.cli.options import echo, json_option, of_study, program, quiet_option
from drtune_ray.errors import ConfigError

if TYPE_CHECKING:
    from drtune_ray.display.jobs import JsonLog
    from drtune_ray.jobs.attempts import Attempt
    from drtune_ray.jobs.server import JobServer


_address_option = click.option(
    "--address",
    required=True,
    metavar="URL",
    help="Address of the job server, http(s)://HOST:PORT.",
)
insecure_http_option = click.option(
    "--insecure-http", is_flag=True, help="Allow plain http to another machine."
)
_where_option = click.option(
    "--storage", metavar="DIR", help="Storage of the study, if several studies have its name."
)


@click.command()
@of_study
@_address_option
@insecure_http_option
@click.option("--no-wait", is_flag=True, help="Return once the job is submitted.")
@click.option("--stop", "is_stopped", is_flag=True, help="Stop the job at Ctrl-C.")
@click.option(
    "--entrypoint-num-cpus",
    "num_cpus",
    type=click.FloatRange(min=0),
    help="CPUs reserved for the search itself. Default: none, on the head node.",
)
@click.option(
    "--entrypoint-num-gpus",
    "num_gpus",
    type=click.FloatRange(min=0),
    help="GPUs reserved for the search itself, which computes the frozen features.",
)
@click.option(
    "--entrypoint-memory",
    "memory",
    type=click.IntRange(min=0),
    help="Memory reserved for the search itself, in bytes.",
)
@click.option(
    "--entrypoint-resources",
    "custom",
    metavar="JSON",
    help="Custom resources reserved for the search itself, as in '{\"big_disk\": 1}'.",
)
@quiet_option
@json_option
def submit(
    study_file: Path | None,
    assignments: tuple[str, ...],
    address: str,
    insecure_http: bool,
    no_wait: bool,
    is_stopped: bool,
    num_cpus: float | None,
    num_gpus: float | None,
    memory: int | None,
    custom: str | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Run tune as a job of a Ray cluster.

    Takes tune's arguments, with paths of the cluster. Follows the job's log and exits with the
    study's exit code. Ctrl-C leaves the job running. The same command attaches to the job while it
    runs, and resumes the study after the job has ended.
    """
    from drtune_ray.display.jobs import JsonLog, job_facts, submit_lines
    from drtune_ray.display.outputs import json_stdout, write_json
    from drtune_ray.jobs.address import checked_address
    from drtune_ray.jobs.submission import (
        STUDY_FILE,
        EntrypointResources,
        custom_resources,
        study_submission,
    )

    with json_stdout(is_wanted=as_json) as stream:
        address = checked_address(address, insecure_http=insecure_http)
        resources = EntrypointResources(num_cpus, num_gpus, memory, custom_resources(custom))
        submission = study_submission(study_file, assignments, flags)
        for note in submission.notes:
            _say(note)
        server = _server(address)
        # Not earlier: it imports ray, and bad input is reported without that delay.
        from drtune_ray.jobs.submit import submit as submit_study

        modes = [mode for mode, is_on in (("--quiet", quiet), ("--json", as_json)) if is_on]
        command = shlex.join(["drtune-ray", "tune", STUDY_FILE, *modes])
        arguments = tuple(sys.argv[1:])
        attempt, is_new = submit_study(server, submission, command, resources, arguments)
        echo(submit_lines(submission, attempt, is_new=is_new), err=True)
        if no_wait:
            _say_ways_on(attempt, address, insecure_http)
            if as_json:
                write_json(stream, "jobs", job_facts([attempt], address))
            return 0
        log = JsonLog(stream, sys.stderr) if as_json else None
        return _follow(server, attempt, insecure_http, is_stopped=is_stopped, log=log)


@click.command()
@click.argument("study")
@_address_option
@insecure_http_option
@_where_option
@click.option("--attempt", "number", type=int, help="Number of the attempt. Default: the newest.")
@click.option(
    "--follow", is_flag=True, help="Follow the log to the job's end, and exit with its code."
)
def logs(
    study: str,
    address: str,
    insecure_http: bool,
    storage: str | None,
    number: int | None,
    follow: bool,
) -> int:
    """Print the log of a submitted study."""
    server, attempts = _attempts(study, storage, address, insecure_http)
    found = [attempt for attempt in attempts if number in (None, attempt.number)]
    if not found:
        numbers = [attempt.number for attempt in attempts]
        raise ConfigError(f"study {study!r} has no attempt {number}: there are {numbers}")
    if follow:
        return _follow(server, found[-1], insecure_http)
    click.echo(server.log(found[-1].submission_id), nl=False)
    return 0


@click.command()
@click.argument("study")
@_address_option
@insecure_http_option
@_where_option
def stop(study: str, address: str, insecure_http: bool, storage: str | None) -> None:
    """Stop a submitted study.

    Its trials save checkpoints first; the same submit resumes it.
    """
    from drtune_ray.jobs.follow import stop as stop_attempt

    server, attempts = _attempts(study, storage, address, insecure_http)
    newest = attempts[-1]
    ended = newest if newest.is_over else stop_attempt(server, newest)
    click.echo(f"{ended.submission_id} is {ended.state.lower()}")


def show_jobs(
    study: str, storage: str | None, address: str, insecure_http: bool, as_json: bool
) -> None:
    """Print a study's jobs on a cluster, as ``status --address`` does."""
    from drtune_ray.display.jobs import job_facts, job_lines
    from drtune_ray.display.outputs import write_json

    server, attempts = _attempts(study, storage, address, insecure_http)
    if as_json:
        write_json(sys.stdout, "jobs", job_facts(attempts, server.address))
    else:
        echo(job_lines(attempts, server.address))


def _attempts(
    study: str, storage: str | None, address: str, insecure_http: bool
) -> tuple[JobServer, list[Attempt]]:
    from drtune_ray.jobs.address import checked_address
    from drtune_ray.jobs.attempts import attempts_at

    server = _server(checked_address(address, insecure_http=insecure_http))
    return server, attempts_at(server.attempts(), study, storage, server.address)


def _server(address: str) -> JobServer:
    from drtune_ray.jobs.server import JobServer

    server = JobServer(address)
    if server.is_open:
        _say(f"{address} asks for no token: whoever reaches it can run code there (SECURITY.md)")
    return server


def _follow(
    server: JobServer,
    attempt: Attempt,
    insecure_http: bool,
    *,
    is_stopped: bool = False,
    log: JsonLog | None = None,
) -> int:
    """Follow to the end and return the study's exit code."""
    from drtune_ray.jobs.attempts import INTERRUPTED, end_of, exit_code_of
    from drtune_ray.jobs.follow import follow

    def write(text: str) -> None:
        click.echo(text, nl=False)

    ended = follow(server, attempt, log.write if log else write, _say, is_stopped=is_stopped)
    if ended is None:
        end: str | None = f"Left {attempt.submission_id} running"
        code = INTERRUPTED
    else:
        end, code = end_of(ended), exit_code_of(ended)
    if end:
        _say(end)
    if ended is None:
        _say_ways_on(attempt, server.address, insecure_http)
    if log:
        log.close(code, end or "done")
    return code


def _say_ways_on(attempt: Attempt, address: str, insecure_http: bool) -> None:
    from drtune_ray.display.jobs import ways_on

    where = f"{address} --insecure-http" if insecure_http else address
    echo(ways_on(attempt, where, program()), err=True)


def _say(text: str) -> None:
    """Print to stderr: stdout is the job's."""
    click.echo(text, err=True)
