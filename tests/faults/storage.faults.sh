# shellcheck shell=bash disable=SC2154 # sourced by run.sh; bin, root, full, most: its
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
  timeout -k 5 "${limit:-120}" mpirun --oversubscribe --bind-to none -np "$ranks" -x FAULT_AFTER "${exports[@]}" \
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
  line=$((($1 - 1) * lines / storage_trials + 1)) # fewer trials than cases: spread over all
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
[ "$storage_trials" -gt "$most" ] && storage_trials=$most
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
  sed -i "s/^ffn_size = .*/ffn_size = 600/; s/^steps = .*/steps = 48/; s/^interval = 2$/interval = 8/
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
  [ "$(curve disk/run | wc -l)" = 48 ] || says "this file misses records" # there was no room for them
  says "step 48/48"
  [ -z "$(find disk/run/checkpoints -name '.tmp-*')" ] || violation "left-overs"
  [ "$(newest_step disk/run)" -ge "$(acknowledged_step)" ] || violation "a checkpoint is gone"
  rm -f disk/other
  train 2 cfg.ini || violation "with room again it fails: $(tail -n 3 log)"
  [ "$(newest_step disk/run)" = 48 ] || violation "not saved with room again"
}
fault "disk full" 2 20 disk_full \
  "warnings, no left-overs, training goes on to its end; saved once there is room"

# ---- damage

# A run of 4 ranks with two checkpoints, made once; damage is put back each time.
damage() {
  if [ ! -e "$root/damage/run" ]; then
    mkdir "$root/damage" && cd "$root/damage" || exit 1
    make_config cfg.ini
    train 4 cfg.ini --set train.micro_batch=1 || violation "no run: $(tail -n 5 log)"
  fi
  "$bin/fault_damage" "$root/damage/run" "$1" "$2" 7 2>/dev/null
}
damage_data() { damage data "$1"; }
damage_metadata() { damage metadata "$1"; }
damage_torn() { damage torn "$1"; }
damage_missing() { damage missing "$1"; }
refused="named and refused; resuming falls back to the one before"
fault_batch "flipped bit in a checkpoint's data" 40 1000 damage_data "$refused"
fault_batch "flipped bit in a checkpoint's metadata" 40 500 damage_metadata "$refused"
fault_batch "torn file of a checkpoint" 20 200 damage_torn "$refused"
fault_batch "missing file of a checkpoint" 5 16 damage_missing "$refused"

# ---- going on

# resume_case FROM TO OPTION...: 4 of 8 steps on FROM ranks, the rest on TO, beside all 8 on TO.
# On the same ranks every bit is the same, on others the loss to a relative 1e-5.
resume_case() {
  local from=$1 to=$2
  shift 2
  local rest=("$@")
  make_config cfg.ini
  train "$to" cfg.ini --set run.dir=whole --set train.micro_batch=$((8 / to)) "$@" ||
    violation "the whole run: $(tail -n 3 log)"
  # The schedule knows all 8 steps; the job is stopped by taking away what it saved later.
  train "$from" cfg.ini --set checkpoint.keep=9 --set train.micro_batch=$((8 / from)) "$@" ||
    violation "the first part: $(tail -n 3 log)"
  rm -r run/checkpoints/step-00000006 run/checkpoints/step-00000008
  train "$to" cfg.ini --set train.micro_batch=$((8 / to)) "${rest[@]}" ||
    violation "the second part: $(tail -n 3 log)"
  says "resuming after step 4:"
  whole_curve 8
  paste <(curve whole) <(curve) | awk -v same=$((from == to)) '
    { d = $2 > $4 ? $2 - $4 : $4 - $2 }
    same ? $2 != $4 : d > 1e-5 * $2 { print "step", $1, $2, $4; bad = 1 } END { exit bad }' ||
    violation "another curve"
}

# 1, 2, 4 ranks to 1, 2, 4; then through the end of an epoch, with sharded optimizer state, and with
# saves in the foreground. The corpus has 9884 samples; valid_fraction leaves an epoch of 5 steps.
resume() {
  local ranks=(1 2 4)
  case $1 in
  10) resume_case 2 4 --set data.valid=none --set data.valid_fraction=0.499 ;;
  11) resume_case 4 2 --set parallel.zero1=true ;;
  12) resume_case 2 2 --set checkpoint.async=off --set precision.dtype=bf16 ;;
  *) resume_case "${ranks[($1 - 1) / 3]}" "${ranks[($1 - 1) % 3]}" ;;
  esac
}
fault "stopped and resumed, 1, 2, 4 -> 1, 2, 4 ranks" 2 12 resume \
  "the same curve: bitwise on the same ranks, else to 1e-5"

# ---- two jobs, contradictions, divergence

second_job() {
  make_config cfg.ini
  mpirun --oversubscribe --bind-to none -np 2 "$bin/moe-train" cfg.ini --set train.steps=100000 \
    --set checkpoint.interval=0 --set log.interval=100000 >first.log 2>&1 &
  local job=$! code
  until [ -s run/metrics.jsonl ] || ! kill -0 $job 2>/dev/null; do sleep 0.02; done
  train $((1 + $1 % 2)) cfg.ini --set train.micro_batch=$((8 / (1 + $1 % 2)))
  code=$?
  kill -0 $job || violation "the first job is gone: $(tail -n 5 first.log)"
  pgrep -P $job | xargs kill -9
  wait $job
  [ $code = 1 ] || violation "exit code $code"
  says "another job (process "
  [ "$(wc -l <run/provenance.jsonl)" = 1 ] || violation "the second job wrote to the run"
}
fault "two jobs on one run directory" 1 20 second_job "the second is refused, the first goes on"

contradictions=(model.rope_alpha=2 model.rope_base=500000 model.num_layers=3 model.hidden_size=32
  model.num_experts=4 model.top_k=2 model.ffn_size=24 model.vocab_size=300 model.num_heads=2
  model.num_kv_heads=4 model.head_dim=6 model.norm_eps=1e-6 model.num_layers=1 model.ffn_size=16
  model.num_experts=16 model.hidden_size=16 model.top_k=1 model.rope_alpha=0.5 model.vocab_size=261
  train.seed=99)

config_disagrees() {
  local set=${contradictions[($1 - 1) % ${#contradictions[@]}]} before code
  make_config cfg.ini
  train 2 cfg.ini --set train.steps=4 --set optim.warmup_steps=1 || violation "no run: $(tail -n 3 log)"
  before=$(find run/checkpoints run/metrics.jsonl -type f -exec sha256sum {} + | sort)
  train 2 cfg.ini --set "$set"
  code=$?
  [ $code = 2 ] || violation "$set: exit code $code: $(grep moe-train: log)"
  says "cannot resume:"
  says "${set%%=*}"
  [ "$before" = "$(find run/checkpoints run/metrics.jsonl -type f -exec sha256sum {} + | sort)" ] ||
    violation "$set: the run was changed"
}
fault "configuration and checkpoint disagree" 2 "${#contradictions[@]}" config_disagrees \
  "refused, exit 2, the differing settings listed, nothing changed"

# Odd trials: a learning rate that breaks the model, which ends the run. Even ones: half precision
# with a loss scale that is too large at first, which the run survives. Steps whose gradient is not
# finite change and save nothing.
not_finite() {
  local code skipped step expected=4
  local options=(--set optim.lr=100 --set optim.clip=0 --set model.init_std=10
    --set train.nonfinite_limit=3)
  if [ $(($1 % 2)) = 0 ]; then
    options=(--set precision.dtype=fp16 --set precision.loss_scale=1.6e7
      --set train.nonfinite_limit=30)
    expected=0
  fi
  make_config cfg.ini
  train 2 cfg.ini "${options[@]}" --set train.seed="$1" --set train.steps=60 \
    --set checkpoint.interval=1 --set checkpoint.keep=60
  code=$?
  [ $code = $expected ] || violation "exit code $code: $(tail -n 3 log)"
  [ $expected = 0 ] || says "training diverged"
  skipped=$(sed -n 's/^{"step": \([0-9]*\),.*"skipped": true.*/\1/p' run/metrics.jsonl)
  [ -n "$skipped" ] || violation "no step was skipped"
  for step in $skipped; do
    [ ! -e "run/checkpoints/step-$(printf %08d "$step")" ] || violation "step $step was saved"
  done
  [ $expected = 4 ] || tail -n 1 run/metrics.jsonl | grep -q '"skipped": false' ||
    violation "it never recovered"
}
fault "loss or gradient not finite" 2 10 not_finite \
  "no update, no save of such a step; exit 4 after the limit, else the run goes on"
