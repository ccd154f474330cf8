#!/usr/bin/env bash
# Everything worth doing on a GPU, in one run under nine minutes: build, tests, sanitizer, benchmarks beside their floors.
#
#   scripts/gpu_check.sh [--dry-run] [--only "PART ..."] OUT
#
# OUT gets at most eight files; a short table comes last. Every part has its own time limit (the last one what is left)
# and runs whatever the others did; the exit status is the number of parts that failed. --dry-run does on a CPU what can
# be done there, tiny. Needs python3 with torch, triton, timm, pytest and setuptools, and nvcc; downloads nothing. The
# GPU's settings are left alone. PYTHON names another interpreter, COMPILE_MODE the mode of the torch.compile baseline:
# max-autotune takes minutes a model, so give it a run of its own, COMPILE_MODE=max-autotune with --only "build steps".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 99

PARTS="build selftest tests steps ops noise sanitizer kernels cpp finetune" # the most wanted first
TOTAL=${TOTAL:-525}                                   # seconds for all parts
PYTHON=${PYTHON:-python3}
DRY=0 OUT=
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DRY=1 ;;
    --only) shift && PARTS=${1:?--only needs parts} ;;
    -*) echo "gpu_check.sh: unknown option $1 (--dry-run, --only \"PART ...\")" >&2 && exit 98 ;;
    *) OUT=$1 ;;
  esac
  shift
done
[ -n "$OUT" ] || { echo "gpu_check.sh: give a folder for the results" >&2 && exit 98; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 97

WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
export PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

build() { # in place, against the torch that is there
  local status=0
  if [ $DRY = 0 ]; then
    install 1 || { status=1 && install 0; } || return 1
  fi
  "$PYTHON" -m fastnull.build_info >"$WORK/build.json" && cat "$WORK/build.json" && return $status
}

install() { FASTNULL_CUDA=$1 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e .; }

selftest() { # every implementation of every op at the sizes of a ViT-B/16: right or wrong, and how fast
  local options=(vit_base_patch16_224 --batch 256)
  [ $DRY = 1 ] && options=(vit_digits --batch 2 --device cpu)
  "$PYTHON" -m fastnull selftest "${options[@]}" --json "$OUT/selftest.json"
}

tests() { # every op and the encoder on the GPU, against float64
  if [ $DRY = 1 ]; then "${PYTEST[@]}" tests/gpu -k "objective or auto_takes"; else "${PYTEST[@]}" tests/gpu -m gpu; fi
}

cpp() { # the same tests on the CUDA C++ kernels, and their times beside Triton's in ops.json
  if [ $DRY = 1 ]; then "${PYTEST[@]}" tests/ops/test_dispatch.py -k "csrc"; return; fi
  export FASTNULL_KERNELS=cuda
  local status=0
  "${PYTEST[@]}" tests/gpu -m gpu || status=1
  bench cpp --only ops projection --dtypes bfloat16 --batch 256 --projected 256 --seconds 0.3 \
    --models vit_base_patch16_224 || status=1
  return $status
}

kernels() { # the kernels' own tests, bfloat16 included
  if [ $DRY = 1 ]; then
    TRITON_INTERPRET=1 "${PYTEST[@]}" tests/kernels/interpreted/test_layer_norm_kernels.py -k "stays_in"
  else
    "${PYTEST[@]}" tests/kernels/interpreted
  fi
}

sanitizer() { # the first of each allocation would hide what lies beside it, so torch's cache is off
  local run=("$PYTHON" scripts/gpu_small_shapes.py)
  if [ $DRY = 1 ]; then TRITON_INTERPRET=1 "${run[@]}"; return; fi
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  "${run[@]}" || return 1 # compiled and right without it
  local status=0
  # kernels' errors alone: torch probes for driver functions that need not be there, and ours raise in Python
  for tool in "memcheck --report-api-errors no" racecheck; do
    # shellcheck disable=SC2086 # a tool with its option
    compute-sanitizer --tool $tool --error-exitcode 9 "${run[@]}" | grep -v "^ok"
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "compute-sanitizer: ${tool%% *} failed" && status=1; }
  done
  return $status
}

bench() { # PART, then options: results go to $WORK/PART, from where `keep` takes them
  local part=$1 && shift
  [ $DRY = 1 ] && set -- "$@" --models vit_digits --batch 2 --projected 1 --no-compile --device cpu --quick --seconds 0
  "$PYTHON" -m fastnull bench "$@" --out "$WORK/$part"
}

keep() { # PART: what it measured, also where it was stopped in the middle
  local found=("$WORK/$1"/*Z-*.json)
  [ ! -f "${found[0]}" ] || cp "${found[0]}" "$OUT/$1.json"
}

steps() {
  bench steps --only encoder --dtypes bfloat16 --batch 256 --seconds 2 --compile-mode "${COMPILE_MODE:-default}" \
    --models vit_small_patch16_224 vit_base_patch32_224 vit_base_patch16_224 vit_large_patch16_224
}

ops() {
  bench ops --only ops projection --dtypes bfloat16 float32 --batch 256 --projected 256 --seconds 0.3 \
    --models vit_small_patch16_224 vit_base_patch16_224
}

finetune() { # what augmentation costs a training step, and where its time goes
  local size=(--batch 128) status=0
  if [ $DRY = 1 ]; then
    size=(--model vit_digits --batch 2 --steps 1 --dtype float32)
  else
    bench finetune --only finetune --dtypes bfloat16 --batch 512 --seconds 1 --models vit_small_patch16_224 || status=1
  fi
  "$PYTHON" -m benchmarks.profile_step "${size[@]}" --out "$WORK/profile.json" && return $status
}

noise() { "$PYTHON" scripts/gpu_noise.py "$WORK/noise.json"; }

limit_of() {
  case $1 in build | selftest | tests | sanitizer) echo 120 ;; steps) echo 230 ;; kernels | cpp) echo 90 ;; *) echo 75 ;; esac
}

for part in $PARTS; do
  declare -F "$part" >/dev/null || { echo "gpu_check.sh: no part is called $part" >&2 && exit 98; }
done
PYTEST=("$PYTHON" -m pytest -o addopts=--strict-markers -q -p no:cacheprovider --tb=short)
if [ $DRY = 1 ]; then
  export FASTNULL_DRY_RUN=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
else
  arch=$("$PYTHON" -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}.{b}' + 'a' * (a == 9))") ||
    { echo "gpu_check.sh: torch sees no GPU; --dry-run does what needs none" >&2 && exit 96; }
  # for this GPU alone: for all of them nvcc takes three times as long
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch}
  export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # where compute-sanitizer lies
  cores=$(nproc)
  # compiling the kernels is what takes the time
  "$PYTHON" -c "import xdist" 2>/dev/null && PYTEST+=(-n $((cores < 14 ? cores : 14)))
fi

failed=0
: >"$OUT/log.txt" && : >"$WORK/parts"
export -f build selftest install tests kernels cpp sanitizer bench steps ops noise finetune
export DRY OUT WORK PYTHON
for part in $PARTS; do
  left=$((TOTAL - SECONDS)) limit=$(limit_of "$part") begin=$SECONDS
  if [ "$limit" -gt "$left" ] || [ "$part" = "${PARTS##* }" ]; then limit=$left; fi
  echo "== $part (at most $limit s)" | tee -a "$OUT/log.txt"
  if [ "$limit" -lt 2 ]; then
    status=124
  else
    timeout -k 5 "$limit" bash -c "PYTEST=(${PYTEST[*]@Q}); $part" 2>&1 | tee -a "$OUT/log.txt" | tail -n 400
    status=${PIPESTATUS[0]}
  fi
  keep "$part"
  [ "$status" = 0 ] || failed=$((failed + 1))
  printf '%s\t%s\t%s\n' "$part" "$status" $((SECONDS - begin)) >>"$WORK/parts"
done
"$PYTHON" scripts/gpu_summary.py "$WORK" "$OUT" || failed=$((failed + 1))
exit "$failed"
