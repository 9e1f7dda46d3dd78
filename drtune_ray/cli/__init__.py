"""The command line: parse, call one function, print."""

from drtune_ray.cli.main import cli, main

__all__ = ["cli", "main"]
