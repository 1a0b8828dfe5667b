#!/bin/bash
# How fast checkpoints are written, beside as many dd writers with fsync as there are ranks: the same
# bytes into the same folder, by turns.
#
#   tests/bench/save_rate.sh BUILD_DIR [RANKS [ROUNDS [OPTION...]]]
#
# RANKS is 2, ROUNDS 3. Options go to moe-train and choose the model (--set model.preset=6.9b); without
# them it is one of 0.2 B parameters, 2.3 GiB a checkpoint. Files go to $SAVE_RATE_DIR (/tmp), which is
# the disk that is measured, with $SAVE_RATE_PAUSE seconds (2) of rest before each. dd reads from
# copies of the shards in memory (/dev/shm; zeros where there is no room), at the priority of
# moe-train's writing threads. Prints each round and the medians; moe-train's seconds are those it
# logs: written includes fsync, verified is reading everything back.
set -eu
[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 2; }
bin=$1/bin ranks=${2:-2} rounds=${3:-3}
shift $(($# < 3 ? $# : 3))
[ $# -gt 0 ] || set -- --set model.hidden_size=512 --set model.num_heads=8 \
  --set model.num_experts=32 --set model.top_k=1 --set model.ffn_size=1024
. "$(dirname "$0")/small_run.sh"
work=$(mktemp -d "${SAVE_RATE_DIR:-/tmp}/save-rate-XXXXXX")
source=$(mktemp -d /dev/shm/save-rate-XXXXXX)
trap 'rm -rf "$work" "$source"' EXIT

small_run "$bin" "$work" "$work/run" 2

# Removed files are discarded in the background, which is not what is to be measured.
settle() { sync "$work" && sleep "${SAVE_RATE_PAUSE:-2}"; }

# One save of one job; sets written_s, verified_s, bytes and leaves the shards.
save() {
  rm -rf "$work/run"
  settle
  mpirun --oversubscribe --bind-to none -np "$ranks" "$bin/moe-train" "$work/cfg.ini" "$@" \
    >"$work/log" 2>&1 || { grep moe-train: "$work/log" >&2; exit 1; }
  [[ $(grep 'saved:' "$work/log") =~ written\ in\ ([0-9.]+)\ s.*verified\ in\ ([0-9.]+)\ s ]]
  written_s=${BASH_REMATCH[1]} verified_s=${BASH_REMATCH[2]}
  shards=("$work"/run/checkpoints/step-*/shard-*)
  bytes=$(stat -c %s "${shards[@]}" | awk '{ n += $1 } END { printf "%.0f", n }')
}

# What dd reads.
remember() {
  local room i
  room=$(df --output=avail -B1 /dev/shm | tail -n 1)
  [ "$room" -ge $((bytes * 5 / 4)) ] || { echo "no room in /dev/shm: dd writes zeros" && return; }
  for i in "${!shards[@]}"; do cp "${shards[i]}" "$source/$i"; done
}

# The same bytes by dd; sets dd_s.
write_plainly() {
  local i from to sizes
  mapfile -t sizes < <(stat -c %s "${shards[@]}")
  rm -rf "$work/run"
  settle
  from=$(date +%s%N)
  for i in "${!sizes[@]}"; do
    if [ -e "$source/$i" ]; then
      nice -n 10 dd if="$source/$i" of="$work/dd.$i" bs=1M conv=fsync 2>/dev/null &
    else
      nice -n 10 dd if=/dev/zero of="$work/dd.$i" bs=1M count=$((sizes[i] >> 20)) conv=fsync 2>/dev/null &
    fi
  done
  wait
  to=$(date +%s%N)
  rm -f "$work"/dd.*
  dd_s=$(awk -v ns=$((to - from)) 'BEGIN { print ns * 1e-9 }')
}

median() { sort -n "$work/$1" | sed -n "$(((rounds + 1) / 2))p"; }

echo "$work on $(stat -f -c %T "$work"), $(nproc) processors"
for ((round = 1; round <= rounds; round++)); do
  save "$@"
  [ $round -gt 1 ] || remember
  write_plainly
  printf '%d: %d MB by %d ranks: written %.2f s, verified %.2f s; dd %.2f s\n' \
    $round $((bytes / 1000000)) "$ranks" "$written_s" "$verified_s" "$dd_s"
  echo "$written_s" >>"$work/written"
  awk -v a="$written_s" -v b="$verified_s" 'BEGIN { print a + b }' >>"$work/both"
  echo "$dd_s" >>"$work/dd"
done
for way in dd written both; do
  awk -v way=$way -v s="$(median $way)" -v dd="$(median dd)" -v n="$bytes" 'BEGIN {
    printf "%-8s %6.2f s  %5.2f GB/s  %4.0f %% of dd\n", way, s, 1e-9 * n / s, 100 * dd / s }'
done
