#!/bin/bash
# What checkpoints cost: preset `small` on 2 CPU ranks, a save every 20 steps, in the background, in
# the foreground and never, by turns.
#
#   tests/bench/save_cost.sh BUILD_DIR TOKENS [ROUNDS [OPTION...]]
#
# TOKENS is the prefix of a token file with ids below 4096; checkpoints go to $SAVE_COST_DIR (/tmp).
# Prints the median time of a step from step 15 to 75, three saves, and what saving adds to it.
set -eu
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2; }
bin=$1/bin tokens=$2 rounds=${3:-5}
shift $(($# < 3 ? $# : 3))
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
work=$(mktemp -d "${SAVE_COST_DIR:-/tmp}/save-cost-XXXXXX")
trap 'rm -rf "$work"' EXIT

cat >"$work/cfg.ini" <<END
[model]
preset = small
[data]
train = $tokens
sequence_length = 512
[train]
micro_batch = 4
steps = 75
[optim]
warmup_steps = 10
[checkpoint]
save_final = false
[run]
dir = $work/run
[log]
tensorboard = false
interval = 1000
END

reached() { [ "$(wc -l 2>/dev/null <"$work/run/metrics.jsonl" || echo 0)" -ge "$1" ]; }

# one OPTION...: milliseconds per step of one job.
one() {
  rm -rf "$work/run"
  mpirun --oversubscribe --bind-to none -np 2 "$bin/moe-train" "$work/cfg.ini" "$@" \
    >"$work/log" 2>&1 &
  local job=$! from to
  until reached 15 || ! kill -0 $job 2>/dev/null; do sleep 0.01; done
  from=$(date +%s%N)
  until reached 75 || ! kill -0 $job 2>/dev/null; do sleep 0.01; done
  to=$(date +%s%N)
  wait $job || { tail -n 5 "$work/log" >&2 && exit 1; }
  echo $(((to - from) / 60000000))
}

for ((round = 1; round <= rounds; round++)); do
  one --set checkpoint.interval=0 "$@" >>"$work/never"
  one --set checkpoint.interval=20 --set checkpoint.async=on "$@" >>"$work/background"
  grep 'saved:' "$work/log" | tail -n 1
  one --set checkpoint.interval=20 --set checkpoint.async=off "$@" >>"$work/foreground"
done
median() { sort -n "$work/$1" | sed -n "$(((rounds + 1) / 2))p"; }
for way in never background foreground; do
  awk -v way="$way" -v ms="$(median $way)" -v base="$(median never)" \
    'BEGIN { printf "%-12s %6d ms/step  %+.1f %%\n", way, ms, 100 * (ms / base - 1) }'
done
