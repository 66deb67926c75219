#!/bin/sh
# Starts `services.<first argument>` under the address that other containers reach this one by.
set -eu
service=$1
shift
set -- --listen 0.0.0.0:50052 --advertise "$(hostname -i | cut -d' ' -f1)" \
    --metrics-host 0.0.0.0 --metrics-port 9100 "$@"
exec python -m "services.$service" "$@"
