#!/usr/bin/env bash
# What only a GPU can tell, in two runs of less than five minutes each, what teaches most first.
#
#   scripts/gpu_check.sh --run 1|2 [--only "PART ..."] [--dry-run] OUT
#
# Run 1: does it work, and how fast is a step. Run 2: torch.compile, compute-sanitizer, a profile. Each part has its own
# time limit, and prints a short table when it ends or is out of time: less than 12,000 characters in all. OUT gets at
# most eight files: table.txt (the tables), log.txt (everything) and JSON. The exit status is the number of parts that
# failed; after a failed `probe` the run stops. --dry-run does on a CPU what can be done there, tiny. Needs python3 with
# torch, triton, timm and pytest, and nvcc for the C++ kernels; downloads nothing and leaves the GPU's settings alone.
# PYTHON names another interpreter, TOTAL the seconds of a run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 99

PYTHON=${PYTHON:-python3} TOTAL=${TOTAL:-285} RUN= ONLY= DRY=0 OUT=
while [ $# -gt 0 ]; do
  case $1 in
    --run) shift && RUN=${1-} ;;
    --only) shift && ONLY=${1:?--only needs parts} ;;
    --dry-run) DRY=1 ;;
    -*) echo "gpu_check.sh: unknown option $1 (--run, --only, --dry-run)" >&2 && exit 98 ;;
    *) OUT=$1 ;;
  esac
  shift
done
case $RUN in
  1) PARTS="install probe gradient built selftest steps tests" ;;
  2)
    PARTS="install probe compiled built cuda sanitizer profile autotune"
    export FASTNULL_KERNELS=triton ;; # no time for a self-test: what it chose is measured in run 1
  *) echo "gpu_check.sh: --run must be 1 or 2; got '$RUN'" >&2 && exit 98 ;;
esac
for part in $ONLY; do
  [[ " $PARTS " = *" $part "* ]] || { echo "gpu_check.sh: run $RUN has no part $part ($PARTS)" >&2 && exit 98; }
done
PARTS=${ONLY:-$PARTS}
[ -n "$OUT" ] || { echo "gpu_check.sh: give a folder for the results" >&2 && exit 98; }
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 97

install() { # in seconds: Triton's kernels need no compiler. Where pip cannot, the checkout itself serves.
  [ $DRY = 1 ] && return
  FASTNULL_NATIVE=0 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . 2>&1 | tail -n 3 ||
    echo "pip cannot install it (above): the checkout serves through PYTHONPATH"
}

build() { # for the GPU that is there; without pyproject.toml, whose licence field older setuptools refuses
  local folder=build/gpu_check
  mkdir -p $folder && cp setup.py $folder && ln -sfn ../../csrc $folder/csrc && ln -sfn ../../fastnull $folder/fastnull
  ln -sfn ../../kernels $folder/kernels && cd $folder && FASTNULL_CUDA=1 "$PYTHON" setup.py --quiet build_ext --inplace
}

built() { # wait for nvcc, then run each of its kernels
  while [ ! -s "$WORK/built" ]; do sleep 0.2; done
  [ "$(cat "$WORK/built")" = 0 ] || { cat "$WORK/build.log" && return 1; }
  "$PYTHON" scripts/gpu_parts.py small "$([ $DRY = 1 ] && echo cpu || echo cuda)"
}

probe() { TRITON_INTERPRET=$DRY "$PYTHON" scripts/gpu_parts.py probe; }

gradient() { FASTNULL_KERNELS=triton "$PYTHON" scripts/gpu_parts.py gradient; } # while nvcc works

selftest() {
  local status=0 model
  if [ $DRY = 1 ]; then
    "$PYTHON" -m fastnull selftest vit_digits --batch 2 --device cpu --json "$OUT/selftest-vit_digits.json"
    return
  fi
  for model in vit_base_patch16_224 vit_small_patch16_224 vit_base_patch32_224; do
    SECONDS=0
    "$PYTHON" -m fastnull selftest $model --json "$OUT/selftest-$model.json" || status=1
    echo "first use of $model: $SECONDS s"
  done
  return $status
}

bench() { # PART, then options
  local part=$1 && shift
  [ $DRY = 1 ] && set -- --models vit_digits --batch 2 --no-compile --device cpu --quick --seconds 0
  [ $DRY = 1 ] || set -- --batch 256 "$@"
  "$PYTHON" -m fastnull bench --only encoder --dtypes bfloat16 "$@" --out "$WORK/$part"
}

steps() {
  bench steps --seconds 2 --no-compile --models vit_base_patch16_224 vit_small_patch16_224 vit_base_patch32_224
}

compiled() { bench compiled --seconds 2 --models vit_base_patch16_224 vit_small_patch16_224; }

cuda() { # the C++ kernels, and Triton's for the ops that have none: beside the rows of `compiled`
  FASTNULL_KERNELS=cuda bench cuda --seconds 1 --no-compile --models vit_base_patch16_224
}

autotune() { bench autotune --seconds 2 --compile-mode max-autotune --models vit_base_patch16_224; }

tests() { # a worker that meets a CUDA error ends itself, and another one goes on
  local pytest=("$PYTHON" -m pytest -o addopts=--strict-markers -v -p no:cacheprovider --tb=short) cores status=0
  if [ $DRY = 1 ]; then
    "${pytest[@]}" tests/gpu -k "objective or auto_takes"
    return
  fi
  cores=$(nproc)
  "$PYTHON" -c "import xdist" && pytest+=(-p tests.gpu.lost_device -n $((cores < 14 ? cores : 14)))
  "${pytest[@]}" tests/gpu || status=1
  "${pytest[@]}" tests/kernels/interpreted && return $status # apart: it puts other kernels under the ops
}

sanitizer() { # without torch's cache: the first of each allocation would hide what lies beside it
  local run=("$PYTHON" scripts/gpu_parts.py small) status=0 tool
  if [ $DRY = 1 ]; then TRITON_INTERPRET=1 "${run[@]}" triton; return; fi
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  "${run[@]}" triton cuda || return 1 # compiled and right without it
  # kernels' errors alone: torch probes for driver functions that need not be there
  for tool in "memcheck --report-api-errors no" racecheck; do
    # shellcheck disable=SC2086 # a tool with its option
    compute-sanitizer --tool $tool --error-exitcode 9 "${run[@]}" triton cuda || status=1
  done
  return $status
}

profile() { # where the time of a training step goes
  local size=(--batch 128)
  [ $DRY = 1 ] && size=(--model vit_digits --batch 2 --steps 1 --dtype float32)
  "$PYTHON" -m benchmarks.profile_step "${size[@]}" --out "$OUT/profile.json"
}

limit_of() {
  case $1 in install) echo 30 ;; compiled) echo 150 ;; selftest) echo 115 ;; sanitizer) echo 100 ;; steps) echo 80 ;;
    tests | autotune) echo 290 ;; *) echo 60 ;; esac
}

WORK=$(mktemp -d) BUILD= made=
trap 'kill $BUILD 2>/dev/null; rm -rf "$WORK" $made' EXIT
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ $DRY = 1 ]; then
  export FASTNULL_DRY_RUN=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 XDG_CACHE_HOME=$WORK
else
  code="import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}.{b}' + 'a' * (a == 9))"
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c "$code") ||
    { echo "gpu_check.sh: torch sees no GPU; --dry-run does what needs none" >&2 && exit 96; }
  export TORCH_CUDA_ARCH_LIST PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # where compute-sanitizer lies
fi
code="import importlib.util as i, sys; sys.exit(i.find_spec('fastnull.kernels') is None)" # where nothing is installed
"$PYTHON" -c "$code" || { ln -s ../kernels fastnull/kernels && made=fastnull/kernels; }

failed=0
: >"$OUT/log.txt" && : >"$OUT/table.txt"
export -f install build built probe gradient selftest bench steps compiled cuda autotune tests sanitizer profile
export DRY OUT WORK PYTHON
for part in $PARTS; do
  if [ "$part" != install ] && [ ! -e "$WORK/build.log" ]; then # nvcc works beside the parts before `built`
    : >"$WORK/build.log"
    if [ $DRY = 1 ]; then
      echo 0 >"$WORK/built"
    elif [[ " $PARTS " = *" built "* ]]; then
      timeout -k 5 200 bash -c 'build; echo $? >"$WORK/built"' >"$WORK/build.log" 2>&1 &
      BUILD=$!
    fi
  fi
  left=$((TOTAL - SECONDS)) limit=$(limit_of "$part") begin=$SECONDS
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $part (at most $limit s)" | tee -a "$OUT/log.txt"
  rm -f "$OUT/$part"*.json # of an earlier run
  if [ "$limit" -lt 2 ]; then
    : >"$WORK/$part.log" && status=124
  else
    timeout -k 5 "$limit" bash -o pipefail -c "$part" 2>&1 | tee "$WORK/$part.log" >>"$OUT/log.txt"
    status=${PIPESTATUS[0]}
  fi
  for json in "$WORK/$part"/*Z-*.json; do [ ! -f "$json" ] || cp "$json" "$OUT/$part.json"; done
  "$PYTHON" scripts/gpu_table.py "$part" "$status" $((SECONDS - begin)) "$WORK/$part.log" "$OUT"
  [ "$status" = 0 ] || failed=$((failed + 1))
  if [ "$part" = built ]; then kill $BUILD 2>/dev/null; fi # what comes late would change the choice in the middle
  if [ "$part" = probe ] && [ "$status" != 0 ]; then echo "gpu_check.sh: stopped: the probe says why" && break; fi
done
exit "$failed"
