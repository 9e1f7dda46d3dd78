"""Print the requirements that pyproject.toml lists, one a line, for the names given.

A name is ``dependencies`` or that of an extra; ``mlflow`` is MLflow's server with accounts and
buckets, in the version of the dependencies.
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
