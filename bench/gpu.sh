#!/usr/bin/env bash
# Checks and times everything on the GPU of this machine, in under 9 minutes and without a network:
#   bench/gpu.sh                       results in bench/results/gpu, or under $OUT where that is set
# Needs Python with torch, Triton, pybind11, ninja, pytest, hypothesis and safetensors, and a C++
# compiler. What is missing (compute-sanitizer, matplotlib, peers) is left out and said so.
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

# 1. The C++ kernels, for this Python and this torch.
MAX_JOBS=$(nproc) timeout "$(least 150)" $PYTHON setup.py build_ext --inplace > "$OUT/build.log" 2>&1
say build $?
timeout "$(least 60)" $PYTHON -m blaq env > "$OUT/env.txt" 2>&1
say "blaq env" $?

# 2. Tests on the device, shares of the GPU's own tests side by side: most of their time is compiling.
timeout "$(least 90)" $PYTHON -m pytest -q -p no:cacheprovider tests/test_gpu.py > "$OUT/test_gpu.log" 2>&1
say tests/test_gpu.py $?
budget=$(least 130)
pids=()
for ((i = 0; i < SHARDS; i++)); do
  BLAQ_TEST_SHARD=$i/$SHARDS timeout "$budget" $PYTHON -m pytest -q -p no:cacheprovider \
    tests/test_triton_*.py tests \
    --ignore=tests/test_gpu.py --ignore=tests/test_demo.py --ignore=tests/test_bench.py > "$OUT/shard-$i.log" 2>&1 &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; [ $code = 5 ] || status=$code; }; done
cat "$OUT"/shard-*.log > "$OUT/tests.log"
tail -qn 1 "$OUT"/shard-*.log | sed 's/^/    /' >> "$summary"
rm -f "$OUT"/shard-*.log
say "tests, $SHARDS shares" $status

# 3. Memory errors of one small case of every kernel.
if command -v compute-sanitizer > /dev/null; then
  timeout "$(least 75)" compute-sanitizer --tool memcheck --error-exitcode 9 \
    $PYTHON bench/gpu_small.py > "$OUT/sanitizer.log" 2>&1
  say "compute-sanitizer memcheck" $?
else
  echo "- compute-sanitizer: not installed" | tee -a "$summary"
fi

# 4. Times, with what is left.
timeout "$(least 400)" $PYTHON bench/gpu.py --out "$OUT" --seconds $(($(left) - 25)) > "$OUT/bench.log" 2>&1
say bench $?
[ -f "$OUT/results.md" ] && cat "$OUT/results.md"
cat "$summary"
exit $failed
