"""TODO docstring."""

from __future__ import annotations

STOPPED_BY_SCHEDULER = "stopped by the scheduler"
CONSTRAINT = "trains"
