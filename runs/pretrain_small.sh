#!/usr/bin/env bash
# Pre-train a small DeepSeek-V3 on text of your own, with the report's shape of schedules scaled to the length of the run.
#   runs/pretrain_small.sh TEXT OUT      TEXT: a file or folder of text, .jsonl, .parquet; OUT: a new folder
set -euo pipefail
text=${1:?give a text to train on} out=${2:?give a folder for the run}

# Warm-up, constant to two thirds, cosine to a tenth, a short tail at a thirtieth; batch growing over the first 3 %;
# lambda 0.3 then 0.1 at two thirds; gamma 0 for the last 3 %: section 4.2 of the report in shares of the run.
dsv3 train --out "$out" --model nano --data "$text" --tokens 20M \
    --batch-size "8, linear 32 3%" --micro-batch-size 8 \
    --learning-rate "0, linear 2e-3 1%, hold 66%, cosine 2e-4 29%, hold 2%, set 7e-5" \
    --mtp-weight "0.3, hold 67%, set 0.1" \
    --bias-update-speed "0.001, hold 97%, set 0" \
    --recompute selective

dsv3 inspect "$out"
dsv3 generate "$out" --prompt "The " --speculative
