#!/bin/sh
# Runs once, on an empty volume: creates two accounts, each the owner of its own database.
set -eu
psql --username "$POSTGRES_USER" --dbname postgres --set ON_ERROR_STOP=1 \
  --set study="$STUDY_PASSWORD" --set mlflow="$MLFLOW_PASSWORD" <<'SQL'
CREATE ROLE drtune LOGIN PASSWORD :'study';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE DATABASE drtune OWNER drtune;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE drtune, mlflow FROM PUBLIC;
SQL
