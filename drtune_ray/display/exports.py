"""What an export says: the file, and how its answers compare with the model's."""

from __future__ import annotations

from collections.abc import Iterator

from drtune_ray.results.export import Exported


def export_lines(found: Exported) -> Iterator[str]:
    """Yield the lines for people."""
    yield f"{found.path} ({found.path.stat().st_size / 2**20:.1f} MiB)"
    if not found.num_validated:
        yield (
            f"Probabilities equal the model's to {found.max_difference:.1g} on {found.num_checked} "
            "images, one at a time and in one batch"
        )
        return
    before, after = found.num_correct_before, found.num_correct
    number = found.num_validated
    yield (
        f"Correct on {after} of {number} validation images ({after / number:.1%}) with 8 bits, "
        f"{before} ({before / number:.1%}) before: {(after - before) / number:+.1%}; a "
        f"probability differs by {found.max_difference:.2g} at most"
    )
