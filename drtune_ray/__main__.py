"""``python -m drtune_ray``: the command line."""

from __future__ import annotations

from drtune_ray.cli import main

if __name__ == "__main__":
    main()
