#!/usr/bin/env bash
# Edit one video with many prompts, and compare the edits in one report.
#
#   examples/many_prompts.sh wolf.mp4 "a wolf in the snow" prompts.txt
#
# prompts.txt holds one prompt a line; empty lines are skipped. More options go into the variables INVERT, EDIT and
# EVALUATE, such as EDIT="--n_timesteps 25 --guidance_scale 7". The last line on stdout is the path of the report.
# Given again, the command goes on where it was stopped, and does nothing twice. A few prompts are quicker as a sweep
# (docs/sweeps.md), which loads the checkpoint once.
set -euo pipefail
video=$1 shown=$2 prompts=$3
root=$(dirname "$0")/..
python=${PYTHON:-python}

"$python" "$root/preprocess.py" --data_path "$video" --inversion_prompt "$shown" ${INVERT:-} > /dev/null

edits=()
while IFS= read -r prompt || [ -n "$prompt" ]; do
  [ -n "$prompt" ] || continue
  edited=$("$python" "$root/run_tokenflow_pnp.py" --data_path "$video" --prompt "$prompt" ${EDIT:-} < /dev/null)
  edits+=("$(dirname "$edited")")
done < "$prompts"

"$python" "$root/evaluate.py" --edits "${edits[@]}" ${EVALUATE:-}
