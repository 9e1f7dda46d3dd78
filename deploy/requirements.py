"""Print requirements of pyproject.toml, a line each: ``dependencies``, or the name of an extra.

``mlflow`` stands for MLflow's server with accounts and buckets, at the version of the dependencies.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
groups = project["optional-dependencies"] | {
    "dependencies": project["dependencies"],
    "mlflow": ["mlflow[auth]", "boto3"],
}
for name in sys.argv[1:]:
    print(*groups[name], sep="\n")
