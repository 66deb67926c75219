#!/usr/bin/env bash
# Builds the images, starts the cluster with two workers in each pool, has the host's `dspark generate` use it, and
# checks that drafts were accepted and that both pools are complete. Needs a Docker engine and the prepared model.
#   DSPARK=path/to/dspark  the host's command (default: the one in .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

dspark=${DSPARK:-.venv/bin/dspark}
python=$(dirname "$dspark")/python
export DSPARK_PORT=${DSPARK_PORT:-50051} DSPARK_CACHE=${DSPARK_CACHE:-$HOME/.cache/dspark}
if docker compose version >/dev/null 2>&1; then
    compose=(docker compose)
else
    compose=(docker-compose)
fi
compose+=(-f deploy/compose.yaml -p dspark-test)

finish() {
    status=$?
    trap - EXIT
    [ $status -eq 0 ] || "${compose[@]}" logs --tail=30 || true
    "${compose[@]}" down --volumes --timeout 10 || true
    exit $status
}
trap finish EXIT

"$dspark" models pull gemma-3-270m
"${compose[@]}" config >/dev/null
"${compose[@]}" build
"${compose[@]}" up -d --scale draft=2 --scale verify=2

"$python" - "127.0.0.1:$DSPARK_PORT" <<'PY'
import sys
import time

from dspark.client import SyncClient
from dspark.errors import DSparkError

deadline, pools = time.monotonic() + 180, []
while pools != ["draft", "draft", "verify", "verify"]:
    if time.monotonic() > deadline:
        sys.exit(f"error: after 180 s the router sees only {pools}")
    time.sleep(1)
    try:
        with SyncClient(sys.argv[1]) as client:
            pools = sorted(worker.role for worker in client.loads().workers)
    except DSparkError as error:
        print(f"waiting: {error}")
print("pools:", pools)
PY

answer=$(mktemp)
"$dspark" generate --router "127.0.0.1:$DSPARK_PORT" --temperature 0 --max-tokens 64 --compare-plain --json \
    "Question: Tom has 3 boxes of 12 pencils. How many pencils does he have?
Answer:" >"$answer"
"$python" - "$answer" <<'PY'
import json
import sys

with open(sys.argv[1]) as file:
    facts = json.load(file)
counts = facts["speculation"]
print(facts["text"])
print(f"tau {counts['tau']:.2f}, {counts['accepted']} of {counts['verified']} verified drafts accepted")
assert counts["accepted"] > 0, "no draft was accepted"
assert facts["same_tokens"], "speculation changed the output"
print("compose test passed")
PY
