#!/bin/sh
# Runs once, on an empty volume: creates two accounts, each the owner of its own database.
set -eu
# The passwords come from the environment: others could read arguments.
psql --username "$POSTGRES_USER" --dbname postgres --set ON_ERROR_STOP=1 <<'SQL'
\getenv study STUDY_PASSWORD
\getenv mlflow MLFLOW_PASSWORD
CREATE ROLE drtune LOGIN PASSWORD :'study';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE DATABASE drtune OWNER drtune;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE drtune, mlflow FROM PUBLIC;
SQL
