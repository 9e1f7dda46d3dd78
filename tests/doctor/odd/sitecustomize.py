"""Makes the processes of a node, or of a server, odd in the ways that ODD names.

A comma separated list: ``clock`` (an hour ahead), ``versions`` (in Ray's workers), ``bare`` (Ray's
workers have no drtune-ray).
"""

import os
import sys
import time

ODD = os.environ.get("ODD", "").split(",")
IS_WORKER = any(part.endswith("default_worker.py") for part in sys.orig_argv)

if "clock" in ODD and (IS_WORKER or "mlflow" in " ".join(sys.orig_argv)):
    true_time = time.time
    time.time = lambda: true_time() + 3600.0
if "versions" in ODD and IS_WORKER:
    import importlib.metadata
    import platform

    platform.python_version = lambda: "3.0.1"
    true_version = importlib.metadata.version
    importlib.metadata.version = lambda name: "1.0.1+cpu" if name == "torch" else true_version(name)
if "bare" in ODD and IS_WORKER:
    sys.modules["drtune_ray"] = None
