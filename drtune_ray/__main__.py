"""``python -m drtune_ray``: the command line."""

from __future__ import annotations

from drtune_ray.import_path import leave_out_current_folder

leave_out_current_folder()  # before the modules that another one could stand in for

from drtune_ray.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
