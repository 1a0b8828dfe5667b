#!/bin/bash
# Checkpoints move between devices: a run saved on some goes on, on others, as if it had not moved.
#
#   tests/gpu/moves.sh PROGRAMS-FOLDER [LAUNCHER...]
#   tests/gpu/moves.sh build/bin                     the GPUs of this machine, and its CPU
#   tests/gpu/moves.sh .gpu/bin .gpu/run             through what finds the programs' libraries
#   DEVICES=2 tests/gpu/moves.sh ...                 at most two of them
#   BACKEND=cpu DEVICES=4 tests/gpu/moves.sh ...     CPU ranks in place of GPUs
#   ONLY='1-2 4-2x2' tests/gpu/moves.sh ...          these moves (first column of the table)
#   KEEP=FOLDER tests/gpu/moves.sh ...               leave the runs and their logs there
#
# On each place a small model (fp32) trains 20 steps without a break and is saved after 10. Each move
# continues from the place's step 10 elsewhere; its losses of steps 11 to 20 must be those of the
# unbroken run to 1e-6, relative (seen: 3e-9; 3e-2 where the moments are lost). A place is a number of
# devices (ep as large as may be), EPxEDP, or cpu, which is 2 CPU ranks. Prints a table and what was
# skipped; ends with 1 when a move failed, 2 when none could be made.
set -u
[ $# -ge 1 ] && [ -d "$1" ] || { sed -n '2,18s/^# \{0,1\}//p' "$0" && exit 2; }
programs=$1 source=$(cd "$(dirname "$0")/../.." && pwd)
shift
launcher=("$@")
backend=${BACKEND:-cuda} tolerance=1e-6 steps=20
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .
  else
    nvidia-smi -L 2>/dev/null | grep -c '^GPU'
  fi
}
if [ "$backend" = cuda ]; then there=$(gpus); else there=4; fi
devices=${DEVICES:-$there}
[ "$backend" != cuda ] || [ "$devices" -le "$there" ] || devices=$there
[ "$devices" -gt 0 ] || { echo "moves.sh: no GPU here: BACKEND=cpu goes without" >&2 && exit 2; }

work=${KEEP:-$(mktemp -d)}
mkdir -p "$work" || exit 2
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
"${launcher[@]}" "$programs/moe-data" tokenize --tokenizer bytes --overwrite \
  --output "$work/tokens" "$source/docs/tour.md" "$source/docs/formats.md" >"$work/data.log" 2>&1 ||
  { cat "$work/data.log" >&2 && exit 2; }
cat >"$work/cfg.ini" <<INI
[model]
preset = tiny
vocab_size = 260
[data]
train = $work/tokens
sequence_length = 64
[train]
steps = $steps
global_batch = 8
[optim]
lr = 3e-3
warmup_steps = 5
[checkpoint]
interval = 10
save_final = false
[log]
tensorboard = false
INI

# ranks PLACE: how many devices (or CPU ranks) it takes.
ranks() {
  case $1 in
  cpu) echo 2 ;;
  *x*) echo $((${1%x*} * ${1#*x})) ;;
  *) echo "$1" ;;
  esac
}

# train NAME PLACE OPTION...: one job, in run folder NAME. Logs in NAME.log.
train() {
  local name=$1 place=$2 n on=$backend ep=0
  shift 2
  n=$(ranks "$place")
  case $place in
  cpu) on=cpu ;;
  *x*) ep=${place%x*} ;;
  esac
  rm -rf "${work:?}/$name"
  timeout 120 "${launcher[@]}" mpirun --oversubscribe --bind-to none -np "$n" "$programs/moe-train" \
    "$work/cfg.ini" --set run.dir="$work/$name" --set run.backend=$on --set parallel.ep="$ep" \
    --set train.micro_batch=$((8 / n)) "$@" >"$work/$name.log" 2>&1
}

# losses NAME FIRST: "step loss" of each step from FIRST to the last, as a run folder has them.
losses() {
  sed -n 's/.*"step": \([0-9]*\),.*"loss": \([^,}]*\).*/\1 \2/p' "$work/$1/metrics.jsonl" |
    awk -v first="$2" '$1 >= first'
}

failed=0 made=0 skipped=

# row MOVE LOSS DEVIATION RESULT
row() { printf '%-10s %-14s %-14s %s\n' "$@"; }

# The unbroken run of a place, made when first asked for.
unbroken() {
  [ -e "$work/at-$1.done" ] && return
  train "at-$1" "$1" || return
  touch "$work/at-$1.done"
}

# move FROM TO
move() {
  local from=$1 to=$2 name=$1-$2 deviation place
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return ;; esac
  for place in "$from" "$to"; do
    [ "$place" != cpu ] || [ "$backend" = cuda ] || return # there is nothing else
    if [ "$place" != cpu ] && [ "$(ranks "$place")" -gt "$devices" ]; then
      skipped="$skipped $name"
      return
    fi
  done
  made=$((made + 1))
  if ! unbroken "$from"; then
    row "$name" - - "FAILED: the unbroken run" && tail -n 15 "$work/at-$from.log" && failed=1
    return
  fi
  if ! train "$name" "$to" --resume "$work/at-$from/checkpoints/step-00000010"; then
    row "$name" - - "FAILED: the continued run" && tail -n 15 "$work/$name.log" && failed=1
    return
  fi
  losses "at-$from" 11 >"$work/whole" && losses "$name" 1 >"$work/continued"
  # Every step from 11 to 20, each once: one missing, or one too many, deviates without bound.
  read -r loss deviation <<<"$(awk -v steps=$steps '
    function distance(a, b) { return (a > b ? a - b : b - a) / (a > 0 ? a : 1) }
    FNR == NR { whole[$1] = $2; next }
    { seen[$1]++; if (!($1 in whole)) worst = 1e9
      else { d = distance(whole[$1] + 0, $2 + 0); if (d > worst) worst = d }
      last = $2 }
    END { for (s = 11; s <= steps; s++) if (seen[s] != 1 || !(s in whole)) worst = 1e9
      printf "%.8f %.1e\n", last, worst }' "$work/whole" "$work/continued")"
  if awk -v d="$deviation" -v t=$tolerance 'BEGIN { exit !(d + 0 <= t) }'; then
    row "$name" "$loss" "$deviation" ok
  else
    row "$name" "$loss" "$deviation" "FAILED: more than $tolerance" && failed=1
  fi
}

echo "up to $devices device(s), backend $backend; places: devices, EPxEDP, or 2 CPU ranks (cpu)"
row from-to "loss, step $steps" "off, relative" ""
move 1 2
move 2 1
move cpu 1
move 1 cpu
move 4 2
move 2 4
move 4 2x2
move 4 8
move 8 4
[ -z "$skipped" ] || echo "skipped for want of devices:$skipped"
[ "$made" -gt 0 ] || { echo "moves.sh: nothing to do" >&2 && exit 2; }
exit $failed
