#!/usr/bin/env bash
# Trains a DSpark drafter and the drafters it is compared with on equal data, with equal steps and feature layers; draft
# layers are equal too, except Eagle3's one; none takes hints. Each stage goes on where it was if this is run again.
# LAYERS (2) and SEQUENCES (4, texts of 16 blocks a step) may be set; DATA names data sets to use instead of making one.
set -euo pipefail
if [ -z "${DATA:-}" ]; then
  : "${PROMPTS:?PROMPTS=FILE with one {\"turns\": [\"…\"]} a line}"
  data=(--data "$OUT/data")
  "$BIN/dspark" train data --model "$MODEL" --prompts "$PROMPTS" --out "$OUT/data" --count 5120 --first 3328 --seed 1
else
  data=()
  for set in $DATA; do data+=(--data "$set"); done
fi
for architecture in dspark dflash eagle3 mtp; do
  layers=${LAYERS:-2}
  [ "$architecture" = eagle3 ] && layers=1
  "$BIN/dspark" train run --model "$MODEL" "${data[@]}" --architecture "$architecture" --layers "$layers" \
    --no-hints --blocks "$BLOCKS" --sequences "${SEQUENCES:-4}" --run-dir "$OUT/runs/$architecture" --out "$OUT/$architecture"
done
