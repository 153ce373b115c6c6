#!/usr/bin/env bash
# Invert, edit and evaluate many videos, as a table says.
#
#   examples/many_videos.sh videos.tsv
#
# Each line of the table is a video, what it shows, and what the edit shows, with a tab between them. Lines that are
# empty or begin with # are skipped. A line that fails does not stop the others; the exit status is 1 then. More options
# go into the variables INVERT, EDIT and EVALUATE. On stdout is the path of each report.
set -uo pipefail
table=$1
root=$(dirname "$0")/..
python=${PYTHON:-python}
failed=0

one_video() {
  "$python" "$root/preprocess.py" --data_path "$1" --inversion_prompt "$2" ${INVERT:-} > /dev/null || return
  edited=$("$python" "$root/run_tokenflow_pnp.py" --data_path "$1" --prompt "$3" ${EDIT:-}) || return
  "$python" "$root/evaluate.py" --edits "$(dirname "$edited")" ${EVALUATE:-}
}

while IFS=$'\t' read -r video shown prompt || [ -n "$video" ]; do
  case $video in "" | "#"*) continue ;; esac
  if ! one_video "$video" "$shown" "$prompt" < /dev/null; then
    echo "failed: $video" >&2
    failed=1
  fi
done < "$table"
exit "$failed"
