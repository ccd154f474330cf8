#!/usr/bin/env bash
# Noise against attacks and corruptions on a pretrained ViT and an image folder: five seeds of `fastnull compare`, then
# AutoAttack on the first seed's models, in less than nine minutes.
#
#   scripts/gpu_result.sh MODEL CHECKPOINT DATA OUT [OPTION ...]
#
# MODEL is timm's name, CHECKPOINT a file with its weights, DATA a folder with train/ and val/. OPTIONs are those of
# `fastnull compare`, in place of the ones below. The runs lie in RUNS (runs/gpu_result), where a second call goes on.
# OUT gets table.txt (which is printed), log.txt and runs.tar.gz, the runs without weights. On a new machine put that
# file at RUNS.tar.gz, and what was finished is not done again. The exit status is the number of steps that failed or
# were out of time. TOTAL are the seconds of all, ATTACK those kept for AutoAttack; ATTACKS names other
# suites in its place. Downloads nothing.
set -uo pipefail
[ $# -ge 4 ] || { echo "gpu_result.sh: give MODEL CHECKPOINT DATA OUT [OPTION ...]" >&2 && exit 98; }
CHECKPOINT=$(realpath -e "$2") && DATA=$(realpath -e "$3") && mkdir -p "$4" && OUT=$(realpath "$4") || exit 97
MODEL=$1 && shift 4
cd "$(dirname "$0")/.." || exit 99
PYTHON=${PYTHON:-python3} TOTAL=${TOTAL:-525} ATTACK=${ATTACK:-100} RUNS=${RUNS:-runs/gpu_result} failed=0 made=
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
trap 'rm -f $made' EXIT
code="import importlib.util as i, sys; sys.exit(i.find_spec('fastnull.kernels') is None)" # where nothing is installed
"$PYTHON" -c "$code" || { ln -s ../kernels fastnull/kernels && made=fastnull/kernels; }

step() { # SECONDS, then words of fastnull; with the signal of Ctrl-C the state is saved
  local limit=$1 && shift
  timeout -s INT -k 15 "$limit" "$PYTHON" -m fastnull "$@" >"$OUT/step.txt" 2>&1
  local status=$?
  cat "$OUT/step.txt" >>"$OUT/log.txt"
  [ $status = 0 ] && return
  failed=$((failed + 1)) && echo "$1 ended with $status after $SECONDS s: $(tail -n 1 "$OUT/step.txt")"
  return $status
}

: >"$OUT/log.txt"
{
  [ -d "$RUNS" ] || [ ! -f "$RUNS.tar.gz" ] || { mkdir -p "$RUNS" && tar -xzf "$RUNS.tar.gz" -C "$RUNS"; }
  step $((TOTAL - ATTACK)) compare --model "$MODEL" --checkpoint "$CHECKPOINT" --data "$DATA" --img-size 98 --seeds 5 \
    --methods none random-pixels boundary-pixels adversarial --start-epochs 2 --budget 9 --lr 2e-4 --layer-decay 0.75 \
    --eps 1 2 4 --images 500 --workers 4 --jobs 3 "$@" --resume --out "$RUNS"
  if [ -f "$RUNS/comparison.md" ]; then
    head -c 7000 "$RUNS/comparison.md"
  else # of what is finished
    step 60 report "$RUNS" --out "$OUT/report" --overwrite && head -c 7000 "$OUT/report/report.md"
  fi
  suites=${ATTACKS:-autoattack}
  [ "$suites" != autoattack ] || "$PYTHON" -c "import pyautoattack" 2>/dev/null || suites="apgd apgd_t" # half of it
  for weights in "$RUNS"/seed-0/*/last.safetensors; do
    method=$(basename "$(dirname "$weights")")
    if [ "$method" = start ] || [ ! -f "$weights" ]; then continue; fi
    echo && echo "$method, seed 0, $suites:"
    # shellcheck disable=SC2086 # suites are words
    step $((TOTAL - SECONDS)) evaluate --model "$weights" --data "$DATA" --suite clean $suites --eps 1/255 --limit 200 \
      --out "$(dirname "$weights")/autoattack.json" --resume && grep "^|" "$OUT/step.txt"
  done
  rm -rf "$OUT/step.txt" "$OUT/report"
  tar --exclude "*.safetensors" --exclude "*.pt" -czf "$OUT/runs.tar.gz" -C "$RUNS" .
  exit $failed
} | tee "$OUT/table.txt"
exit "${PIPESTATUS[0]}"
