# shellcheck shell=bash disable=SC2154 # sourced by run.sh; bin, root: its
# Faults of processes: ranks that die or hang, and requests to stop.

# A run without end: steps take milliseconds, each fifth saves. The rate is constant, so that the
# curve does not depend on where a run ends.
endless_config() {
  make_config cfg.ini
  sed -i 's/^steps = .*/steps = 1000000/; s/^interval = .*/interval = 5/
    s/^lr = .*/lr = 5e-3\nschedule = constant/' cfg.ini
}

# The curve of the first 200 steps when nothing disturbs, made once.
endless_reference() {
  [ -e "$root/endless.curve" ] && return
  mkdir "$root/endless" && cd "$root/endless" || exit 1
  endless_config
  train 2 cfg.ini --set train.steps=200 --set checkpoint.interval=0 ||
    violation "the undisturbed run failed: $(tail -n 5 log)"
  curve >"$root/endless.curve"
}

# start RANKS [OPTION...]: a job in the background, $job; its output goes to ./log.
start() {
  local ranks=$1
  shift
  timeout -k 5 60 mpirun --oversubscribe --bind-to none -np "$ranks" \
    "$bin/moe-train" cfg.ini "$@" >log 2>&1 &
  job=$!
}

# wait_until COMMAND...: at most 30 s, and while the job lives.
wait_until() {
  local i
  for ((i = 0; i < 3000; i++)); do
    "$@" && return
    kill -0 "$job" 2>/dev/null || break
    sleep 0.01
  done
  violation "the job never came to: $*: $(tail -n 5 log)"
}

# The process of rank $1 of the job.
rank_pid() {
  local launcher pid
  launcher=$(pgrep -P "$job" -x mpirun) || return 1
  for pid in $(pgrep -P "$launcher"); do
    tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$1" &&
      echo "$pid" && return
  done
  return 1
}

# Does rank $1 have a handler for USR2 (signal 12)?
listens() {
  local pid caught
  pid=$(rank_pid "$1") || return 1
  caught=$(sed -n 's/^SigCgt:\t//p' "/proc/$pid/status" 2>/dev/null)
  [ -n "$caught" ] && [ $((16#$caught & 1 << 11)) != 0 ]
}

has_saved() {
  grep -q 'checkpoint of step [0-9]* saved' log
}

# Somewhere in the half second after the first save: in a step, a save, or between.
let_run() {
  wait_until has_saved
  sleep "0.$((RANDOM % 5))$((RANDOM % 10))"
}

# ends CODE SECONDS: the job ends with this code within that time from now.
ends() {
  local begin code
  begin=$(date +%s%N)
  wait "$job"
  code=$?
  took=$((($(date +%s%N) - begin) / 1000000))
  [ "$code" = "$1" ] || violation "exit code $code instead of $1: $(grep moe-train log | tail -n 5)"
  [ "$took" -le $(($2 * 1000)) ] || violation "it took $took ms to end"
}

# Nothing acknowledged is lost, and the same command goes on to the curve of an undisturbed run.
goes_on() {
  local saved newest last
  (endless_reference) || exit 1
  saved=$(acknowledged_step) newest=$(newest_step)
  [ "$newest" -ge "$saved" ] || violation "step $saved was saved, step $newest is there"
  last=$((newest + 5))
  mv log fault.log
  train "$1" cfg.ini --set train.steps=$last || violation "cannot go on: $(grep moe-train log | tail -n 3)"
  says "resuming after step $newest:"
  whole_curve $last
  [ "$1" != 2 ] || [ -z "$(diff <(curve | head -n 200) <(head -n $last "$root/endless.curve"))" ] ||
    violation "another curve: $(diff <(curve | head -n 200) <(head -n $last "$root/endless.curve") | head -n 4)"
}

# stopped: by request, all of it saved, once.
stopped_and_saved() {
  local step
  step=$(sed -n 's/.*stopped .* after step \([0-9]*\) of.*: saved.*/\1/p' log)
  [ -n "$step" ] || violation "not said to be stopped and saved: $(grep moe-train log | tail -n 3)"
  [ "$(newest_step)" = "$step" ] || violation "stopped after step $step, saved $(newest_step)"
  [ "$(grep -c "checkpoint of step $step saved" log)" = 1 ] || violation "saved more than once"
}

# ---- ranks that die

rank_dies() {
  local ranks victim signal
  RANDOM=$1
  ranks=$((1 << (1 + $1 % 2)))
  victim=$((RANDOM % ranks))
  signal=$(case $((RANDOM % 3)) in 0) echo ABRT ;; 1) echo SEGV ;; *) echo KILL ;; esac)
  endless_config
  start $ranks
  let_run
  kill -"$signal" "$(rank_pid $victim)" || violation "no rank $victim"
  ends $((128 + $(kill -l "$signal"))) 10
  says "process rank $victim"
  goes_on $ranks
}
fault "a rank dies in a step or save" 1 50 rank_dies "the job ends within 10 s, and goes on"

# ---- ranks that hang

rank_is_stopped() {
  local ranks victim
  RANDOM=$1
  ranks=$((1 << (1 + $1 % 2)))
  victim=$((RANDOM % ranks))
  endless_config
  start $ranks --set run.watchdog_step_s=2 --set run.watchdog_save_s=2
  let_run
  kill -STOP "$(rank_pid $victim)" || violation "no rank $victim"
  ends 76 8 # 2 + 5, and mpirun's end
  says "no answer from rank $victim (pid"
  says "the job hung in s" # step or save
  [ "$(grep -c 'watchdog: rank [0-9]* (pid [0-9]* on .*): ' log)" = $ranks ] ||
    violation "not one line per rank: $(grep watchdog log)"
  goes_on $ranks
}
fault "a rank hangs (SIGSTOP)" 1 20 rank_is_stopped \
  "exit 76 within the limit and 5 s, the rank and everyone's place named; the job goes on"

job_is_suspended() {
  endless_config
  start 2 --set run.watchdog_step_s=2 --set run.watchdog_save_s=2
  let_run
  local pids
  pids="$(rank_pid 0) $(rank_pid 1)"
  # shellcheck disable=SC2086 # two of them
  kill -STOP $pids && sleep 5 && kill -CONT $pids
  sleep 1
  kill -USR2 "$(rank_pid 0)"
  ends 75 10
  stopped_and_saved
}
fault "the whole job is suspended" 0 5 job_is_suspended "goes on: the time does not count"

# ---- requests to stop

# One rank or all; TERM, INT or USR2.
request() {
  local signal rank
  signal=$(case $((RANDOM % 3)) in 0) echo TERM ;; 1) echo INT ;; *) echo USR2 ;; esac)
  for ((rank = 0; rank < $1; rank++)); do
    [ $((RANDOM % 2)) = 0 ] && [ "$rank" != 0 ] && continue
    kill -"$signal" "$(rank_pid $rank)" || violation "no rank $rank"
  done
}

is_stopped() {
  RANDOM=$1
  endless_config
  start 2
  let_run
  request 2
  ends 75 10
  stopped_and_saved
  goes_on 2
}
fault "TERM, INT or USR2, also during a save" 2 50 is_stopped \
  "one save at the step boundary, exit 75, same curve after going on"

# The request comes before the first step: at the first moment, or up to half a second later.
is_stopped_at_start() {
  RANDOM=$1
  endless_config
  start 2
  wait_until listens 0
  wait_until listens 1
  [ "$1" = 1 ] || sleep "0.$((RANDOM % 5))"
  request 2
  ends 75 15
  if grep -q 'after step 0 of .*nothing to save yet' log; then
    [ "$(newest_step)" = 0 ] || violation "there is a checkpoint"
  else
    stopped_and_saved
  fi
}
fault "TERM, INT or USR2 while starting" 1 20 is_stopped_at_start \
  "exit 75, with whatever there was to save"

# An evaluation that would last for minutes.
is_stopped_in_evaluation() {
  endless_config
  sed -i "s|^train = .*|&\nvalid = $root/tokens|; s/^interval = 5/interval = 0/" cfg.ini
  start 2 --set train.eval_interval=3 --set train.eval_batches=10000000
  wait_until evaluates
  request 2
  ends 75 10
  stopped_and_saved
  says "after step 3 of"
}
evaluates() {
  [ -e run/metrics.jsonl ] && [ "$(curve | wc -l)" -ge 3 ]
}
fault "TERM, INT or USR2 in an evaluation" 1 10 is_stopped_in_evaluation \
  "the evaluation is left, exit 75"

# A second INT does not wait for anything: here the first cannot be obeyed, since a rank is stopped.
is_interrupted_twice() {
  endless_config
  sed -i "s|^train = .*|&\nvalid = $root/tokens|; s/^interval = 5/interval = 1/" cfg.ini
  start 2 --set train.eval_interval=3 --set train.eval_batches=10000000
  wait_until evaluates
  local pid
  kill -STOP "$(rank_pid 0)"
  pid=$(rank_pid 1)
  kill -INT "$pid"
  sleep 0.5
  kill -0 "$pid" || violation "the first ended it"
  kill -INT "$pid"
  ends 130 10
  mv log fault.log
  train 2 cfg.ini --set train.steps=5 || violation "cannot go on: $(grep moe-train: log | tail -n 3)"
  whole_curve 5
}
fault "a second INT" 0 5 is_interrupted_twice "ends at once"

# ---- the wall clock

time_runs_out() {
  endless_config
  start 2 --set run.wall_clock_limit=0.1
  ends 75 7
  stopped_and_saved
  says "stopped by run.wall_clock_limit"
  mv log first.log
  # A limit that is up before the first step still lets each run make one.
  start 2 --set run.wall_clock_limit=0.0001
  ends 75 30
  stopped_and_saved
  says "resuming after step $(sed -n 's/.*after step \([0-9]*\) of.*/\1/p' first.log):"
}
fault "run.wall_clock_limit" 1 5 time_runs_out "exit 75 in time, saved; each run makes a step"
