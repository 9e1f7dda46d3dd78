"""A process of its own that asks a store for a table: ``python -m tests.data.builder``.

It prints ``building`` when it begins to build and ``has it`` when it has the table, then waits for
its standard input to be closed before it closes the store.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from drtune_ray.data.cache import write_array
from drtune_ray.data.table_store import TableStore

NAME = "rows-0.arrow"
ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)


def write_rows(path: Path) -> None:
    write_array(path, [ROWS])


def main(storage: str, seconds: str) -> None:
    def write_slowly(path: Path) -> None:
        path.write_bytes(b"half of a table")
        print("building", flush=True)
        time.sleep(float(seconds))
        write_rows(path)

    with TableStore(Path(storage), limit_gib=1.0) as store:
        store.table(NAME, write_slowly)
        print("has it", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
