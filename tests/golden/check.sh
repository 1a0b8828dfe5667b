#!/usr/bin/env bash
# check.sh FILE.h5 [--ranks N] [--recompute none|swiglu|experts|block] [--backend cpu|cuda]
#                  [--dtype fp32|bf16|fp16] [--set section.key=value]...
#
# Train on a golden file, on any number of ranks, and print the largest deviation of each quantity
# from the oracle's answers. Exit 0 within tolerance, 1 beyond it. The build folder is $MOE_BUILD, or
# build.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=${MOE_BUILD:-$here/../../build}
ranks=1
args=()
while [ $# -gt 0 ]; do
  case $1 in
    --ranks) ranks=$2; shift 2 ;;
    --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) args+=("$1"); shift ;;
  esac
done
program=$build/bin/golden_check
if [ ! -x "$program" ]; then
  cmake -S "$here/../.." -B "$build" -G Ninja >/dev/null && cmake --build "$build" --target golden_check >/dev/null
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec mpirun --oversubscribe -np "$ranks" "$program" "${args[@]}"
