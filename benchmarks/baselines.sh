#!/usr/bin/env bash
# Trains a DSpark drafter and the drafters it is compared with on equal data, with equal steps and feature layers; draft
# layers are equal too, except Eagle3's one; none takes hints. Each stage goes on where it was if this is run again.
set -euo pipefail
: "${PROMPTS:?PROMPTS=FILE with one {\"turns\": [\"…\"]} a line}"
data=("--data" "$OUT/data")
"$BIN/dspark" train data --model "$MODEL" --prompts "$PROMPTS" --out "$OUT/data" --count 5120 --first 3328 --seed 1
for architecture in dspark dflash eagle3 mtp; do
  layers=2
  [ "$architecture" = eagle3 ] && layers=1
  "$BIN/dspark" train run --model "$MODEL" "${data[@]}" --architecture "$architecture" --layers "$layers" \
    --no-hints --blocks "$BLOCKS" --run-dir "$OUT/runs/$architecture" --out "$OUT/$architecture"
done
