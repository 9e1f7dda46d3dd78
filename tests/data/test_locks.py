from __future__ import annotations

import threading
from pathlib import Path

from drtune_ray.data.locks import EXCLUSIVE, EXCLUSIVE_AT_ONCE, SHARED, flocked


def is_free(path: Path) -> bool:
    with flocked(path, EXCLUSIVE_AT_ONCE) as is_held:
        return is_held


def test_flocked__shared_by_many_or_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert is_free(path)
    with flocked(path, SHARED), flocked(path, SHARED):
        assert not is_free(path)
    with flocked(path, EXCLUSIVE) as is_held:
        assert is_held
        assert not is_free(path)
    assert is_free(path)


def test_flocked__a_lock_that_was_removed_while_it_was_waited_for_is_no_lock(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    found: list[bool] = []

    def wait() -> None:
        with flocked(path, EXCLUSIVE):
            found.append(is_free(path))

    with flocked(path, EXCLUSIVE):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        path.unlink()
    thread.join(timeout=10)
    # What it holds is the file that stands there now, so that nobody else gets the lock.
    assert found == [False]
