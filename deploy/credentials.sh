#!/bin/sh
# Give every account of docker-compose.yml a password of its own: `deploy/credentials.sh [FILE]`.
# Adds the passwords that FILE (by default .env) lacks and prints them; those that are there stay.
set -eu
cd "$(dirname "$0")/.."
file=${1:-.env}
umask 077
touch "$file"
chmod 600 "$file"
# A last line without its end would run into the first password.
[ -z "$(tail -c 1 "$file")" ] || echo >> "$file"

for name in MINIO_ROOT_PASSWORD GRAFANA_ADMIN_PASSWORD \
  PERENNIAL_S3_SECRET_KEY_INTAKE PERENNIAL_S3_SECRET_KEY_SCORER PERENNIAL_S3_SECRET_KEY_STREAMS \
  PERENNIAL_S3_SECRET_KEY_LEARNER PERENNIAL_S3_SECRET_KEY_SUBSCRIBER PERENNIAL_S3_SECRET_KEY_OPERATOR \
  PERENNIAL_S3_SECRET_KEY_COLLECTOR PERENNIAL_S3_SECRET_KEY_PROVISIONER
do
  if grep -q "^$name=." "$file"; then continue; fi
  value=$(od -An -v -N24 -tx1 /dev/urandom | tr -d ' \n')
  [ ${#value} -eq 48 ] || { echo "no random bytes from /dev/urandom" >&2; exit 1; }
  echo "$name=$value" >> "$file"
  echo "$name=$value"
done
echo "passwords are in $file, which only its owner may read" >&2
