#!/bin/sh
# Every operation's tests on a GPU: run.sh PROGRAM [LAUNCHER...]
#
#   tests/gpu/run.sh build/bin/gpu_tests                     with each choice of kernels
#   SANITIZE=memcheck tests/gpu/run.sh build/bin/gpu_tests   under compute-sanitizer (slow); also
#                                                            racecheck, synccheck, initcheck
#   ONLY='router gpu_router' tests/gpu/run.sh ...            these suites
#   tests/gpu/run.sh .gpu/bin/gpu_tests .gpu/run             through what finds its libraries
#
# Where moe-train and moe-data lie beside PROGRAM, whole runs move between devices, too (moves.sh).
# With two GPUs, where they lie there: mpi_generate, texts of both are those of one; mpi_recorded,
# recorded steps are those that are not.
# Prints one line per suite and what a failing one said; ends with 1 when any failed.
set -u
program=${1:?usage: run.sh PROGRAM [LAUNCHER...]}
shift
export MOE_TEST_BACKEND=cuda
failed=0 log=$(mktemp)
trap 'rm -f "$log"' EXIT
suites=${ONLY:-$("$@" "$program" --list | sed -n 's/^\([a-z_0-9]*\): .*/\1/p')}
[ -n "$suites" ] || { echo "run.sh: $program lists no tests" >&2; exit 2; }

# check TEXT COMMAND...: one line, and the output when it fails
check() {
  text=$1
  shift
  begin=$(date +%s)
  if "$@" >"$log" 2>&1; then result=ok; else result=FAILED failed=1; fi
  printf '%-44s %-6s %4s s\n' "$text" "$result" $(($(date +%s) - begin))
  [ "$result" = ok ] || tail -n 60 "$log"
}

if [ -n "${SANITIZE:-}" ]; then
  export MOE_GEMM=own MOE_ATTENTION="${MOE_ATTENTION:-own}" # our kernels, not the libraries'
  tests='*' # racecheck is slow at thousands of draws, of kernels that other tests run too
  [ "$SANITIZE" != racecheck ] || tests='!(follows_the_softmax*|top_*|cuts_among*|survives*)'
  for suite in $suites; do # the gpu_ suites and whole steps are too much for it; the others do
    case $suite in gpu_* | step) [ -n "${ONLY:-}" ] || continue ;; esac
    check "$SANITIZE $suite" "$@" compute-sanitizer --tool "$SANITIZE" --target-processes all \
      --error-exitcode 9 "$program" -j4 --filter "$suite/$tests" --timeout 900
  done
  exit $failed
fi

for suite in $suites; do
  check "$suite" "$@" "$program" -j2 --filter "$suite/*" --timeout 600
done
for suite in gemm experts gpu_gemm gpu_experts; do
  check "$suite, own products" "$@" env MOE_GEMM=own MOE_EXPERT_GEMM=cublas "$program" -j2 \
    --filter "$suite/*" --timeout 600
done
for suite in experts gpu_experts gpu_determinism; do
  check "$suite, cuBLAS per expert" "$@" env MOE_EXPERT_GEMM=cublas "$program" -j2 \
    --filter "$suite/*" --timeout 600
done
for wish in cudnn mma; do
  check "attention, $wish" "$@" env MOE_ATTENTION=$wish "$program" -j2 --filter 'attention/*' \
    --timeout 600
done
for suite in attention_cached experts_decode gpu_decode; do
  check "$suite, plain" "$@" env MOE_PLAIN=overlap,router \
    MOE_ATTENTION=exact "$program" -j2 --filter "$suite/*" --timeout 600
done
programs=$(dirname "$program")
if [ -z "${ONLY:-}" ] && [ -x "$programs/moe-train" ] && [ -x "$programs/moe-data" ]; then
  check "runs, saved and continued elsewhere" "$(dirname "$0")/moves.sh" "$programs" "$@"
fi
if [ -z "${ONLY:-}" ] && [ "$(nvidia-smi -L | grep -c '^GPU')" -ge 2 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  [ ! -x "$programs/mpi_generate" ] ||
    check "texts on 1 and 2 GPUs" "$@" mpirun --bind-to none -np 2 "$programs/mpi_generate"
  [ ! -x "$programs/mpi_recorded" ] ||
    check "recorded steps of 2 GPUs" "$@" mpirun --bind-to none -np 2 "$programs/mpi_recorded"
fi
exit $failed
