#!/bin/bash
# Break things on purpose and see whether the promises hold.
#
#   tests/faults/run.sh [--full] [--trials N] [--only REGEX] [--build DIR] [--report FILE] [--list] [--keep]
#
#   --full         the full number of trials of each fault; without it a few of each (CI)
#   --trials N     at most N trials of each
#   --only REGEX   only faults whose name matches
#   --build DIR    where bin/moe-train is (build)
#   --report FILE  put the results into FILE's table, one row per fault (docs/faults.md with --full)
#   --list         say what there is
#   --keep         leave the folders of failed trials
#
# A fault is a line in a file tests/faults/*.faults.sh:
#
#   fault NAME SHORT FULL FUNCTION "what must hold"
#
# FUNCTION TRIAL is called for TRIAL = 1..SHORT or 1..FULL, in a subshell whose working directory is
# new and empty. It returns 0 when all is as promised; 77 when this machine cannot do it (its last
# line says why); anything else is a violation, and what it printed is shown. `fault_batch` is for
# programs that do many trials at once: FUNCTION COUNT prints one line `violation: ...` for each.
# The helpers that faults share are in tests/faults/helpers.sh.
set -u
here=$(cd "$(dirname "$0")" && pwd)
source_dir=$(cd "$here/../.." && pwd)
build=$source_dir/build
full='' only=. report='' list='' keep='' most=1000000

while [ $# -gt 0 ]; do
  case "$1" in
  --full) full=1 ;;
  --trials) most=$((${2-0})) && shift ;;
  --only) only=${2-} && shift ;;
  --build) build=$(cd "${2-}" && pwd) || exit 2 && shift ;;
  --report) report=${2-} && shift ;;
  --list) list=1 ;;
  --keep) keep=1 ;;
  *)
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] && exit 0
    exit 2
    ;;
  esac
  shift
done
bin=$build/bin
[ -n "$list" ] || [ -x "$bin/moe-train" ] || {
  echo "run.sh: no moe-train: $bin: build first (cmake, ninja), or give --build DIR" >&2
  exit 2
}

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none

# Where fsync is quick, unless the caller wants a particular disk.
root=$(mktemp -d "${MOE_FAULTS_DIR:-$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)}/moe-faults-XXXXXX")
rows=$root/rows.md
touch "$rows"
cleanup() {
  if [ -n "$keep" ] && [ "$total_violations" -gt 0 ]; then echo "kept: $root"; else rm -rf "$root"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM
total_violations=0

# shellcheck source=tests/faults/helpers.sh
. "$here/helpers.sh"

# row NAME TRIALS EXPECTED VIOLATIONS SECONDS
row() {
  local line
  line=$(printf '| %s | %s | %s | %s | %d s |' "$1" "$2" "$3" "$4" "$5")
  echo "$line" >>"$rows"
  printf '%-44s %6s trials, %s violations, %d s\n' "$1" "$2" "$4" "$5"
}

wanted() {
  [[ $1 =~ $only ]] || return 1
  [ -z "$list" ] && return 0
  printf '%-44s %5s short %6s full: %s\n' "$1" "$2" "$3" "$5"
  return 1
}

fault() {
  wanted "$@" || return 0
  local name=$1 trials=$2 function=$4 expected=$5 violations=0 trial code begin
  [ -n "$full" ] && trials=$3
  [ "$trials" -gt "$most" ] && trials=$most
  begin=$SECONDS
  for ((trial = 1; trial <= trials; trial++)); do
    local place=$root/${name//[^a-zA-Z0-9]/-}-$trial
    mkdir "$place"
    (cd "$place" && "$function" "$trial") >"$place.out" 2>&1
    code=$?
    if [ "$code" = 77 ]; then
      row "$name" 0 "not run: $(tail -n1 "$place.out")" 0 0
      return
    elif [ "$code" != 0 ]; then
      violations=$((violations + 1))
      echo "violation: $name, trial $trial (status $code):"
      tail -n 25 "$place.out" | sed 's/^/    /'
      [ -n "$keep" ] && continue
    fi
    rm -rf "$place" "$place.out"
  done
  total_violations=$((total_violations + violations))
  row "$name" "$trials" "$expected" "$violations" $((SECONDS - begin))
}

fault_batch() {
  wanted "$@" || return 0
  local name=$1 trials=$2 function=$4 expected=$5 violations begin
  [ -n "$full" ] && trials=$3
  [ "$trials" -gt "$most" ] && trials=$most
  begin=$SECONDS
  local place=$root/${name//[^a-zA-Z0-9]/-}
  mkdir "$place"
  (cd "$place" && "$function" "$trials") >"$place.out" 2>&1 || echo "violation: status $?" >>"$place.out"
  violations=$(grep -c '^violation' "$place.out")
  [ "$violations" -gt 0 ] && echo "$name:" && tail -n 25 "$place.out" | sed 's/^/    /'
  total_violations=$((total_violations + violations))
  row "$name" "$trials" "$expected" "$violations" $((SECONDS - begin))
  [ -n "$keep" ] || rm -rf "$place"
}

for faults in "$here"/*.faults.sh; do
  # shellcheck source=/dev/null
  [ -e "$faults" ] && . "$faults"
done
[ -n "$list" ] && exit 0

# The rows of this run replace those of the same name; others stay.
if [ -n "$report" ]; then
  [ -e "$report" ] || cp "$here/report.md" "$report"
  awk -F ' [|] ' -v rows="$rows" '
    function name(line) { sub(/^[|] /, "", line); sub(/ [|].*/, "", line); return line }
    BEGIN { while ((getline line < rows) > 0) { new[name(line)] = line; order[n++] = name(line) } }
    /^[|] / && (name($0) in new) { print new[name($0)]; delete new[name($0)]; next }
    { lines = 1 }
    /^$/ && table { for (i = 0; i < n; i++) if (order[i] in new) { print new[order[i]]; delete new[order[i]] } table = 0 }
    /^[|]---/ { table = 1 }
    { print }
    END { for (i = 0; i < n; i++) if (order[i] in new) print new[order[i]] }' "$report" >"$root/report" &&
    cp "$root/report" "$report"
fi
printf '%d violations in %d s\n' "$total_violations" "$SECONDS"
[ "$total_violations" = 0 ]
