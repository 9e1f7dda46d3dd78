"""One trial on one process group; knows nothing of studies, Tune or MLflow."""
