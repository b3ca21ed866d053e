#!/usr/bin/env bash
# Checks and times everything on the GPU of this machine, in under 9 minutes and without a network:
#   bench/gpu.sh                       results in bench/results/gpu, or under $OUT where that is set
# Needs Python with torch, Triton, pybind11, ninja, pytest, hypothesis, safetensors, scikit-learn and
# scipy, and a C++ compiler. What else is missing (compute-sanitizer, matplotlib, peers) is left out
# and said so.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
SECONDS_ALL=${SECONDS_ALL:-525}
SHARDS=${SHARDS:-$(( $(nproc) > 2 ? $(nproc) - 2 : 1 ))}
$PYTHON -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
  { echo "bench/gpu.sh: a CUDA device must be there for $PYTHON, got none" >&2; exit 2; }
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD:$PWD/python" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2 PYTHONDONTWRITEBYTECODE=1
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"  # compute-sanitizer
unset TRITON_INTERPRET
SECONDS=0 failed=0
summary=$OUT/summary.md
: > "$summary"

left() { local left=$((SECONDS_ALL - SECONDS)); echo $((left > 1 ? left : 1)); }
least() { local time=$(left); echo $(($1 < time ? $1 : time)); }
# say NAME STATUS: one line of the summary; 124 is a budget that ran out.
say() {
  local word="failed ($2)"
  [ "$2" = 0 ] && word=passed
  [ "$2" = 124 ] && word="ran out of its time"
  echo "- $1: $word, at ${SECONDS} s" | tee -a "$summary"
  [ "$2" = 0 ] || failed=1
}

# 1. The C++ kernels, for this Python and this torch; the CUDA ones where nvcc is, for this device, or
# as they are where they have been built.
export BLAQ_CUDA=0
command -v nvcc > /dev/null && [ -z "$(ls blaq_kernels/_cuda*.so 2> /dev/null)" ] && export BLAQ_CUDA=1
BLAQ_CUDA_ARCHITECTURES=$($PYTHON -c 'import torch; c = torch.cuda.get_device_capability(); print({8: "80"}.get(c[0], f"{c[0]}{c[1]}a"))')
export BLAQ_CUDA_ARCHITECTURES
MAX_JOBS=$(nproc) timeout "$(least 150)" $PYTHON setup.py build_ext --inplace > "$OUT/build.log" 2>&1
say build $?
timeout "$(least 60)" $PYTHON -m blaq env > "$OUT/env.txt" 2>&1
say "blaq env" $?

# tests NAME SECONDS ARGUMENTS: pytest in processes side by side, each with a share of the tests, since
# compiling takes most of the time.
tests() {
  local name=$1 budget i pid pids=() status=0
  budget=$(least "$2")
  shift 2
  for ((i = 0; i < SHARDS; i++)); do
    BLAQ_TEST_SHARD=$i/$SHARDS timeout "$budget" $PYTHON -m pytest -q -p no:cacheprovider \
      --continue-on-collection-errors "$@" > "$OUT/shard-$i.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || { code=$?; [ $code = 5 ] || status=$code; }; done
  cat "$OUT"/shard-*.log > "$OUT/$name.log"
  tail -qn 1 "$OUT"/shard-*.log | sed 's/^/    /' >> "$summary"
  rm -f "$OUT"/shard-*.log
  say "$name, $SHARDS shares" $status
}

# 2. Tests: the device's own first. Beside them compiles what the sanitizer will run: under it, that
# would take its time. The contract in machine code needs no device and is not for here.
timeout "$(least 150)" $PYTHON bench/gpu_small.py > "$OUT/small.log" 2>&1 &
small=$!
tests test_gpu 110 tests/test_gpu.py
if ls blaq_kernels/_cuda*.so > /dev/null 2>&1; then
  BLAQ_BACKEND=cuda tests test_gpu_cuda 90 tests/test_gpu_cuda.py tests/test_gpu.py
  BLAQ_BACKEND=cuda timeout "$(least 30)" $PYTHON -m blaq env > "$OUT/env-cuda.txt" 2>&1
  say "blaq env, CUDA C++" $?
else
  echo "- CUDA C++: no nvcc, and no blaq_kernels._cuda" | tee -a "$summary"
fi
tests tests 120 tests/test_triton_{packed,conv2d,training,lists}.py tests --ignore=tests/test_gpu.py --ignore=tests/test_demo.py \
  --ignore=tests/test_bench.py --ignore=tests/test_triton_contract.py
wait $small
say "a small case of every kernel" $?

# 3. Memory errors of these cases. Without torch's cache every tensor ends where its memory ends.
if command -v compute-sanitizer > /dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(least 75)" compute-sanitizer --tool memcheck \
    --report-api-errors no --error-exitcode 9 $PYTHON bench/gpu_small.py > "$OUT/sanitizer.log" 2>&1
  say "compute-sanitizer memcheck" $?
  if ls blaq_kernels/_cuda*.so > /dev/null 2>&1; then
    for check in memcheck racecheck; do
      BLAQ_BACKEND=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(least 60)" compute-sanitizer --tool $check \
        --report-api-errors no --error-exitcode 9 $PYTHON -m pytest -q -p no:cacheprovider \
        tests/test_gpu_cuda.py -k "layout or tiny or (8_bits and bfloat16 and 256)" > "$OUT/sanitizer-cuda-$check.log" 2>&1
      say "compute-sanitizer $check of CUDA C++" $?
    done
  fi
else
  echo "- compute-sanitizer: not installed" | tee -a "$summary"
fi

# 4. Times, with what is left.
timeout "$(least 400)" $PYTHON bench/gpu.py --out "$OUT" --seconds $(($(left) - 25)) > "$OUT/bench.log" 2>&1
say bench $?
[ -f "$OUT/results.md" ] && cat "$OUT/results.md"
cat "$summary"
exit $failed
