"""What became of a trial, as Optuna is told: the counterpart of `proposals`."""

from __future__ import annotations

STOPPED_BY_SCHEDULER = "stopped by the scheduler"
CONSTRAINT = "trains"
