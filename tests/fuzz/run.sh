#!/bin/sh
# Fuzz every parser of files that users give us.
#
#   tests/fuzz/run.sh [SECONDS [NAME...]]   SECONDS (default 60) each, as many at a time as cores
#
# Builds tests/fuzz/fuzz_NAME.c in build-fuzz with clang, starts from tests/fuzz/seeds/NAME and keeps
# what it learns in build-fuzz/corpus/NAME. An input that fails is left in build-fuzz/failures.
set -eu
cd "$(dirname "$0")/../.."
build=${MOE_FUZZ_BUILD:-build-fuzz}
seconds=${1:-60}
[ $# -gt 0 ] && shift
case "$seconds" in
'' | *[!0-9]*)
  echo "usage: tests/fuzz/run.sh [SECONDS [NAME...]]" >&2
  exit 2
  ;;
esac

names=${*:-$(cd tests/fuzz && ls fuzz_*.c | sed 's/^fuzz_//; s/\.c$//')}
targets=$(for name in $names; do echo "fuzz_$name"; done)

launcher=
command -v ccache >/dev/null && launcher="-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache"
cmake -S . -B "$build" -G Ninja -DMOE_FUZZ=ON -DMOE_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ $launcher >"$build.log" 2>&1 || {
  cat "$build.log" >&2
  exit 1
}
rm -f "$build.log"
ninja -C "$build" --quiet $targets

fuzz_one() {
  mkdir -p "$build/corpus/$1" "$build/failures" "tests/fuzz/seeds/$1"
  log="$build/fuzz_$1.log"
  # UBSan and LeakSanitizer report through ASan's exit; a slow or greedy input is a fault as well.
  if "$build/bin/fuzz_$1" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
    -malloc_limit_mb=1024 -max_len=65536 -print_final_stats=1 \
    -artifact_prefix="$build/failures/$1-" \
    "$build/corpus/$1" "tests/fuzz/seeds/$1" >"$log" 2>&1; then
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    echo "fuzz_$1: $runs inputs in $seconds s, no failure"
  else
    echo "fuzz_$1: FAILED, the input is in $build/failures, the report in $log:" >&2
    tail -n 40 "$log" >&2
    return 1
  fi
}

# Groups of as many as there are cores; each group is waited for.
cores=$(nproc)
failed=0
set -- $names
while [ $# -gt 0 ]; do
  pids=
  for _ in $(seq "$cores"); do
    [ $# -gt 0 ] || break
    fuzz_one "$1" &
    pids="$pids $!"
    shift
  done
  for pid in $pids; do wait "$pid" || failed=1; done
done
exit $failed
