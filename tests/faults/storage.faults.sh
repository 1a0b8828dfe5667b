# shellcheck shell=bash disable=SC2154 # sourced by run.sh; bin, root, full: its
# Faults of the disk, and of processes while they write to it.

shim=$bin/libmoe_fault_shim.so

# A model with few tensors, so few calls per save; 6 steps, a save after each second.
storage_config() {
  make_config cfg.ini
  sed -i 's/^num_experts = .*/num_experts = 2/; s/^top_k = .*/top_k = 1/; s/^steps = .*/steps = 6/
    s/^num_heads/num_layers = 1\nnum_heads/' cfg.ini
  sed -i "/^\[checkpoint\]/a async = $([ $(($1 % 4)) = 0 ] && echo off || echo auto)" cfg.ini
}

# The curve of the run that nothing disturbed, made once.
storage_reference() {
  if [ ! -e "$root/storage.curve" ]; then
    mkdir "$root/reference" && cd "$root/reference" || exit 1
    storage_config 1
    train 2 cfg.ini || violation "the undisturbed run failed: $(tail -n 5 log)"
    curve >"$root/storage.curve"
  fi
}

# with_shim VARIABLE=VALUE... RANKS CONFIG...: train with the failing disk, from the first save on.
with_shim() {
  local exports=()
  while [[ $1 == *=* ]]; do
    export "${1?}"
    exports+=(-x "${1%%=*}")
    shift
  done
  export FAULT_AFTER=$PWD/run/checkpoints/step-00000002/manifest.json
  local ranks=$1 code
  shift
  timeout -k 5 60 mpirun --oversubscribe --bind-to none -np "$ranks" -x FAULT_AFTER "${exports[@]}" \
    -x "LD_PRELOAD=$shim" "$bin/moe-train" "$@" >log 2>&1
  code=$?
  [ "$code" = 124 ] && violation "the job hung: $(tail -n 3 log)"
  return "$code"
}

# After a fault: nothing acknowledged is lost, and the same command goes on to the same curve.
goes_on_as_if_nothing_happened() {
  local saved newest
  saved=$(acknowledged_step) newest=$(newest_step)
  [ "$newest" -ge "$saved" ] || violation "step $saved was saved, step $newest is there"
  mv log fault.log
  train 2 cfg.ini || violation "cannot go on: $(grep moe-train: log | tail -n 3)"
  grep -q 'skipping the checkpoint' log && violation "a checkpoint is damaged: $(grep skipping log)"
  [ "$newest" = 0 ] || [ "$newest" = 6 ] || says "resuming after step $newest:"
  whole_curve 6
  [ "$(curve)" = "$(cat "$root/storage.curve")" ] || violation "another curve: $(curve)"
  [ -z "$(find run/checkpoints -name '.tmp-*' -o -name '.del-*')" ] ||
    [ "$newest" = 6 ] || violation "left-overs: $(ls -a run/checkpoints)"
}

# ---- kill -9

# How many calls a save makes on the disk: "RANK CALL COUNT" lines, by a run that is only watched.
storage_tally() {
  if [ ! -e "$root/tally" ]; then
    mkdir "$root/tallied" && cd "$root/tallied" || exit 1
    storage_config 1
    with_shim FAULT_TALLY="$root/tally" 2 cfg.ini --set train.steps=4 ||
      violation "cannot count calls: $(tail -n 5 log)"
    sort -o "$root/tally" "$root/tally"
  fi
}

# Odd trials: a rank (0, 1 or both) is killed at a call on the disk, any of a save's. Even ones:
# at any time, by a clock.
kill_during_save() {
  (storage_reference) && (storage_tally) || exit 1
  storage_config "$1"
  local calls victim at
  calls=$(awk '{ n[$1] += $3 } END { print (n[0] > n[1] ? n[0] : n[1]) }' "$root/tally")
  RANDOM=$1
  if [ $(($1 % 2)) = 1 ]; then
    at=$((1 + (RANDOM * 32768 + RANDOM) % (calls * 5 / 4)))
    with_shim FAULT_CALL=any FAULT_KIND=kill FAULT_AT=$at \
      FAULT_RANK="$(case $((RANDOM % 3)) in 0) echo 0 ;; 1) echo 1 ;; esac)" 2 cfg.ini
  else
    mpirun --oversubscribe --bind-to none -np 2 "$bin/moe-train" cfg.ini >log 2>&1 &
    local job=$!
    until [ -e run/checkpoints/step-00000002 ] || ! kill -0 $job 2>/dev/null; do sleep 0.01; done
    sleep "0.0$((RANDOM % 100))"
    mapfile -t victim < <(pgrep -P $job)
    [ ${#victim[@]} = 0 ] || kill -9 "${victim[@]:$((RANDOM % 2))}" 2>/dev/null
    wait $job
  fi
  goes_on_as_if_nothing_happened
}
fault "kill -9 during save, one rank or all" 4 200 kill_during_save \
  "resumes after the last acknowledged step or later, same curve to the last bit"

# ---- calls that fail

# All cases, one a line: CALL N RANK KIND MODE.
storage_cases() {
  (storage_tally) || exit 1
  [ -e "$root/cases" ] && return
  awk '$2 == "read" { for (n = 1; n <= $3; n += 7) print $2, n, $1, "EIO", "once"; next }
    { for (n = 1; n <= $3; n++) {
        print $2, n, $1, "EIO", "once"
        print $2, n, $1, n % 2 ? "ENOSPC" : "EIO", "on"
        if ($2 == "write") print $2, n, $1, "short", n % 3 ? "once" : "on" } }' \
    "$root/tally" >"$root/cases"
}

call_fails() {
  (storage_reference) && (storage_cases) || exit 1
  storage_config "$1"
  local lines line call at rank kind mode code
  lines=$(wc -l <"$root/cases")
  line=$(($1 <= storage_trials ? ($1 - 1) * lines / storage_trials + 1 : $1))
  read -r call at rank kind mode < <(sed -n "${line}p" "$root/cases")
  echo "$call $at of rank $rank: $kind, $mode"
  with_shim FAULT_CALL="$call" FAULT_AT="$at" FAULT_RANK="$rank" FAULT_KIND="$kind" \
    FAULT_MODE="$mode" 2 cfg.ini
  code=$?
  # Once: the last save, which is another, succeeds. From then on: it may fail, which is status 1.
  [ "$code" = 0 ] || { [ "$code" = 1 ] && [ "$mode" = on ]; } ||
    violation "exit code $code: $(grep moe-train: log | tail -n 3)"
  [ "$code" = 0 ] || grep -q '^moe-train: .*checkpoints' log || violation "no cause is named"
  [ "$(curve | wc -l)" = 6 ] || violation "training did not go on"
  [ "$(newest_step)" -ge 2 ] || violation "the old checkpoint is gone"
  [ "$code" = 1 ] || [ "$(newest_step)" = 6 ] || violation "the last save is missing"
  goes_on_as_if_nothing_happened
}
storage_trials=6
if [ -n "$full" ] && [ -z "$list" ] && [[ "a call on the disk fails" =~ $only ]]; then
  (storage_cases) && storage_trials=$(wc -l <"$root/cases")
fi
fault "a call on the disk fails" 6 "$storage_trials" call_fails \
  "old checkpoint intact, a warning, training goes on, same curve to the last bit"

# ---- a full disk

# A run of checkpoints of 8.6 MB whose disk has room for one, not for two: a file system of 40 MiB
# that something else fills, or (even trials) a limit on the size of files, which stops even the
# first. Then there is room again.
disk_full() {
  local disk=$PWD/disk code
  mkdir disk
  make_config cfg.ini "[log]" "interval = 100"
  sed -i "s/^ffn_size = .*/ffn_size = 600/; s/^steps = .*/steps = 120/; s/^interval = 2$/interval = 20/
    s|^dir = run|dir = $disk/run|" cfg.ini
  RANDOM=$1
  if [ $(($1 % 2)) = 1 ] && mount -t tmpfs -o size=40m faults disk 2>/dev/null; then
    # shellcheck disable=SC2064 # now: $disk is gone when the trap runs
    trap "umount -l '$disk'" EXIT
    head -c $((24000000 + RANDOM * 200)) /dev/zero >disk/other
    train 2 cfg.ini
  else
    # MPI's shared memory is files, too: it must do without.
    OMPI_MCA_btl=self,tcp OMPI_MCA_btl_tcp_if_include=lo \
      under="prlimit --fsize=$((300000 + RANDOM * 100)):" train 2 cfg.ini
  fi
  code=$?
  [ "$code" = 1 ] || violation "exit code $code: $(tail -n 5 log)"
  says "was not saved:"
  [ "$(curve disk/run | wc -l)" = 120 ] || violation "training did not go on: $(tail -n 3 log)"
  [ -z "$(find disk/run/checkpoints -name '.tmp-*')" ] || violation "left-overs"
  [ "$(newest_step disk/run)" -ge "$(acknowledged_step)" ] || violation "a checkpoint is gone"
  rm -f disk/other
  train 2 cfg.ini || violation "with room again it fails: $(tail -n 3 log)"
  [ "$(newest_step disk/run)" = 120 ] || violation "not saved with room again"
}
fault "disk full" 2 20 disk_full \
  "warnings, no left-overs, training goes on to its end; saved once there is room"
