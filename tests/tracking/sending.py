"""Send a spool at once, without a writer."""

from __future__ import annotations

from drtune_ray.tracking.spool import Spool
from drtune_ray.tracking.writer import Recorder, send_events, send_files


def send_unsent(spool: Spool, recorder: Recorder) -> int:
    """Send every unsent event, then every unsent file; return their number."""
    return send_events(spool, recorder) + send_files(spool, recorder)
