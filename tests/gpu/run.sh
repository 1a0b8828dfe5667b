#!/bin/sh
# Every operation's tests on a GPU: run.sh BIN_DIR [LAUNCHER...]
#
#   tests/gpu/run.sh build/bin                     all programs, with each choice of kernels
#   SANITIZE=1 tests/gpu/run.sh build/bin          the same under compute-sanitizer (slow)
#   tests/gpu/run.sh .gpu/bin/bin .gpu/run         programs that need a launcher to find libraries
#
# Prints one line per program and the failing programs' output; ends with 1 when any failed.
set -u
bin=${1:?usage: run.sh BIN_DIR [LAUNCHER...]}
shift
export MOE_TEST_BACKEND=cuda
failed=0 log=$(mktemp)
trap 'rm -f "$log"' EXIT

# check TEXT COMMAND...: one line, and the output when it fails
check() {
  text=$1
  shift
  begin=$(date +%s)
  if "$@" >"$log" 2>&1; then result=ok; else result=FAILED failed=1; fi
  printf '%-60s %s (%s s)\n' "$text" "$result" $(($(date +%s) - begin))
  [ "$result" = ok ] || grep -v '^\[----\] *$' "$log" | tail -n 60
}

operations=$(ls "$bin"/test_kernels_* "$bin"/test_gpu_* 2>/dev/null)
[ -n "$operations" ] || { echo "run.sh: no test_kernels_* or test_gpu_* in $bin" >&2; exit 2; }

if [ "${SANITIZE:-0}" = 1 ]; then
  command -v compute-sanitizer >/dev/null || { echo "run.sh: no compute-sanitizer" >&2; exit 2; }
  for tool in memcheck racecheck initcheck; do
    for program in "$bin"/test_kernels_*; do
      # initcheck: tests read guards and poison that no kernel wrote; memory from uploads is known
      check "$tool $(basename "$program")" "$@" compute-sanitizer --tool "$tool" \
        --target-processes all --error-exitcode 9 --kernel-regex-exclude kns=cublas \
        "$program" -j1 --timeout 600
    done
  done
  exit $failed
fi

for program in $operations; do
  check "$(basename "$program")" "$@" "$program" -j2 --timeout 600
done
for program in "$bin"/test_kernels_gemm "$bin"/test_kernels_experts "$bin"/test_gpu_dense \
  "$bin"/test_gpu_moe; do
  check "$(basename "$program"), own products" "$@" env MOE_GEMM=own MOE_EXPERT_GEMM=cublas \
    "$program" -j2 --timeout 600
done
for program in "$bin"/test_kernels_experts "$bin"/test_gpu_moe; do
  check "$(basename "$program"), cuBLAS per expert" "$@" env MOE_EXPERT_GEMM=cublas \
    "$program" -j2 --timeout 600
done
exit $failed
