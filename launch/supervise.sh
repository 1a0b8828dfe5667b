# shellcheck shell=bash disable=SC2154 # sourced by moe-run, which sets the options
# Attempt after attempt: signals, back-off, logs, and with --elastic the hosts that are left.
#
# The idea: only committed progress, a newer checkpoint, is worth another round of attempts.

# ---- elastic: ranks on the hosts that are left ---------------------------------------------------

answers() { # HOST
  case $1 in localhost | "$(hostname)" | "$(hostname -s)") return 0 ;; esac
  # shellcheck disable=SC2086 # the agent may be a command with options
  timeout 15 ${OMPI_MCA_plm_rsh_agent:-ssh -o BatchMode=yes -o ConnectTimeout=5} "$1" true \
    </dev/null >/dev/null 2>&1
}

# The most ranks that divide the global batch: the micro-batch stays as it is, so that memory per
# rank does, and what ranks do not do at once they do one after the other.
largest_np() { # SLOTS
  local n=$(($1 < wanted_np ? $1 : wanted_np))
  for (( ; n >= min_np; n--)); do
    if ((global_batch % (micro_batch * n) == 0 && (ep == 0 || n % ep == 0))); then
      echo "$n" && return
    fi
  done
  return 1
}

place_ranks() {
  local i left=0 lost='' before=$np
  [ -n "$elastic" ] || return 0
  for i in "${!host_names[@]}"; do
    host_slots[i]=${wanted_slots[i]}
    answers "${host_names[i]}" || { host_slots[i]=0 && lost+=" ${host_names[i]}"; }
    left=$((left + host_slots[i]))
  done
  if ! np=$(largest_np "$left"); then
    np=$before
    say "no answer from:$lost; $left slots left, where no number of ranks from --min-np $min_np on" \
      "divides train.global_batch = $global_batch in micro-batches of $micro_batch"
    return 1
  fi
  if [ -n "$lost" ] || [ "$np" -ne "$before" ]; then
    say "${lost:+no answer from:$lost; }$np of $wanted_np ranks: a step is still $global_batch sequences" \
      "= $np ranks x micro-batch $micro_batch x $((global_batch / (np * micro_batch)))"
  fi
}

# ---- signals -------------------------------------------------------------------------------------

pid='' signalled='' stopping='' interrupts=0

ask_to_stop() { # SIGNAL
  signalled=1
  if [ "$1" = INT ]; then interrupts=$((interrupts + 1)); fi
  if [ "$interrupts" -gt 1 ]; then
    say "ending at once"
    stopping=INT
    [ -z "$pid" ] || kill -"$([ "$interrupts" -eq 2 ] && echo TERM || echo KILL)" "$pid" 2>/dev/null
    return
  fi
  [ -n "$stopping" ] || say "$1: the job saves and stops; interrupt twice to end it at once"
  stopping=${stopping:-$1}
  # TERM would make mpirun kill the ranks; USR2 it passes on.
  [ -z "$pid" ] || kill -USR2 "$pid" 2>/dev/null
}

# Wait for $pid, however often a signal interrupts that, and set code.
wait_for_job() {
  local got
  code=127
  while :; do
    signalled=
    wait "$pid"
    got=$?
    [ $got -eq 127 ] || code=$got
    [ -n "$signalled" ] || break
  done
  pid=
}

pause() { # SECONDS
  sleep "$1" &
  pid=$!
  local keep=$code
  wait_for_job
  code=$keep
}

# ---- one attempt ---------------------------------------------------------------------------------

newest_checkpoint() {
  local place newest=0
  for place in "$run_dir"/checkpoints/step-*/manifest.json; do
    [[ $place =~ /step-0*([0-9]+)/manifest.json$ ]] || continue
    if [ "${BASH_REMATCH[1]}" -gt "$newest" ]; then newest=${BASH_REMATCH[1]}; fi
  done
  echo "$newest"
}

# The last step in metrics.jsonl, if this attempt wrote there.
last_step() { # LOG_FOLDER
  local step=''
  if [ "$run_dir/metrics.jsonl" -nt "$1/command" ]; then
    step=$(tail -n 2 "$run_dir/metrics.jsonl" | sed -n 's/^{"step": *\([0-9]*\),.*/\1/p' | tail -n 1)
  fi
  echo "${step:-0}"
}

# Which rank failed first, in the words of mpirun and srun.
failed_rank() { # LOG_FOLDER
  sed -n -e 's/.*process rank \([0-9]*\) with PID.*/\1/p' \
    -e 's/.*MPI_ABORT was invoked on rank \([0-9]*\) .*/\1/p' \
    -e 's/.*Process name: \[\[[0-9]*,[0-9]*\],\([0-9]*\)\].*/\1/p' \
    -e 's/^srun: error: .*tasks\{0,1\} \([0-9]*\)[^:]*: .*/\1/p' "$1"/launcher.log | head -n 1
}

show_end() { # FILE
  [ -s "$1" ] || { say "it printed nothing" && return; }
  echo "moe-run: the end of $1:" >&2
  tail -n 12 "$1" | tr '\r' '\n' | sed 's/^/  | /' >&2
}

next_folder() {
  local place last=0
  for place in "$logs"/attempt-*; do
    [[ $place =~ /attempt-0*([0-9]+)$ ]] && [ "${BASH_REMATCH[1]}" -gt "$last" ] && last=${BASH_REMATCH[1]}
  done
  printf '%s/attempt-%03d' "$logs" $((last + 1))
}

run_attempt() { # sets code, folder
  local tee_pid tries
  folder=$(next_folder)
  mkdir -p "$folder" || exit 1
  build_command "$folder"
  printf '%q ' "${command[@]}" >"$folder/command"
  [ "$launcher" = srun ] || link_logs "$folder"
  exec 3> >(trap '' INT TERM USR2 && exec tee "$folder/launcher.log" >&2)
  tee_pid=$!
  # A session of its own: the terminal's INT must not reach mpirun. Should this script be killed,
  # the job saves and stops.
  setpriv --pdeathsig USR2 setsid "${command[@]}" </dev/null 2>&3 3>&- &
  pid=$!
  exec 3>&-
  [ -z "$stopping" ] || kill -USR2 "$pid"
  if [ "$launcher" = srun ]; then tail -q -n +1 -F --pid=$pid "$folder/rank-00.log" 2>/dev/null & fi
  wait_for_job
  # All of launcher.log, unless something that mpirun left behind keeps it open.
  for ((tries = 0; tries < 20; tries++)); do
    kill -0 "$tee_pid" 2>/dev/null || break
    sleep 0.1
  done
}

# ---- attempt after attempt -----------------------------------------------------------------------

# A host that is lost, in the words of mpirun, whose exit code then says nothing.
lost_host() { # LOG_FOLDER
  local host
  host=$(sed -n 's/^ *Remote daemon: .* on node \([^ ]*\)$/\1/p' "$1/launcher.log" | head -n 1)
  if [ -n "$host" ]; then
    echo "lost contact with $host"
  elif grep -q 'unable to reliably start one or more daemons' "$1/launcher.log"; then
    echo "a host was lost or cannot be reached"
  fi
}

meaning() { # of an exit code
  case $1 in
  0) echo "done" ;;
  2) echo "bad usage or configuration" ;;
  3) echo "damaged or unsafe input file" ;;
  4) echo "training diverged" ;;
  75) echo "stopped after saving" ;;
  76) echo "a rank did not answer in time" ;;
  126 | 127) echo "program or launcher not found" ;;
  129 | 1[3-8]? | 19[0-2]) echo "killed by $(kill -l $(($1 - 128)) 2>/dev/null || echo a signal)" ;;
  *) echo "failed" ;;
  esac
}

report() { # WHAT_NEXT
  local at lost
  at=$(last_step "$folder")
  lost=$(lost_host "$folder")
  say "${folder##*/} on $np ranks: exit $code, ${lost:-$(meaning "$code")};" \
    "$([ "$at" -gt 0 ] && echo "at step $at, ")saved up to step $(newest_checkpoint); $1"
}

show_failure() {
  local rank
  rank=$(failed_rank "$folder")
  if [ -n "$rank" ]; then
    say "rank $rank $([ "$code" -eq 76 ] && echo 'ended the job' || echo 'failed first')"
    show_end "$(printf '%s/rank-%02d.log' "$folder" "$rank")"
  elif [ -z "$(lost_host "$folder")" ]; then
    show_end "$folder/launcher.log"
  fi
}

end_stopped() { # TELL: how to say it
  if [ -n "${SLURM_JOB_ID-}" ] && [ "${stopping:-USR2}" = USR2 ]; then
    "$1" "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || say "scontrol requeue $SLURM_JOB_ID failed: submit it again"
  else
    "$1" "run the same command again to go on"
  fi
  exit "$code"
}

# Waiting time before attempt number $1 of those that brought nothing.
delay() {
  local s=$backoff i
  for ((i = 1; i < $1 && s < backoff_limit; i++)); do s=$((2 * s)); done
  echo $((s < backoff_limit ? s : backoff_limit))
}

# After an attempt that ended as it should, or as no repetition would mend: the end of this script.
end_if_final() {
  case $code in
  0) report "all done" && exit 0 ;;
  2 | 3 | 4)
    show_failure
    report "not tried again: mend it first"
    exit "$code"
    ;;
  esac
  if [ -n "$stopping" ] || { [ "$code" -eq 75 ] && [ -z "$restart_on_stop" ]; }; then
    end_stopped report
  fi
}

# Failed attempts in a row since a checkpoint was added, and since any step was done.
restarts=0 fruitless=0

count_progress() { # STEP_SAVED_BEFORE
  fruitless=$((fruitless + 1))
  if [ "$(last_step "$folder")" -gt "$1" ]; then fruitless=0; fi
  if [ "$(newest_checkpoint)" -gt "$1" ]; then restarts=0 fruitless=0; fi
}

# What `tell` says about the attempt ends in what is done next: give up, or wait.
wait_or_give_up() { # TELL
  local wait_s
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$max_restarts" ]; then
    "$1" "not tried again: $max_restarts restarts without a new checkpoint"
    exit "$code"
  elif [ "$fruitless" -ge 3 ]; then
    "$1" "not tried again: three attempts without a step"
    exit "$code"
  fi
  wait_s=$(delay "$restarts")
  "$1" "again in $wait_s s"
  pause "$wait_s"
  if [ -n "$stopping" ]; then end_stopped say; fi
}

supervise() {
  local saved
  code=1
  while :; do
    saved=$(newest_checkpoint)
    if ! place_ranks; then
      fruitless=$((fruitless + 1))
      wait_or_give_up say
      continue
    fi
    run_attempt
    end_if_final
    count_progress "$saved"
    if [ "$code" -eq 75 ] && [ "$restarts" -eq 0 ] && [ "$fruitless" -eq 0 ]; then
      report "again"
      continue
    fi
    show_failure
    wait_or_give_up report
  done
}
