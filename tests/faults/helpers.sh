# shellcheck shell=bash disable=SC2154 # bin, root: of run.sh
# What faults share. Sourced by run.sh; functions work in the trial's own folder.

# One line on why, and the trial's end.
violation() {
  echo "violation: $*"
  exit 1
}

# make_corpus PREFIX: tokens of text that has something to learn, the same every time.
make_corpus() {
  awk 'BEGIN { srand(7); for (i = 0; i < 400; i++) {
    n = 20 + int(rand() * 60); line = ""
    for (j = 0; j < n; j++) line = line substr("the cat sat on a mat and ran away ", (i + j) % 30 + 1, 4)
    print line } }' >"$1.txt"
  "$bin/moe-data" tokenize --input "$1.txt" --tokenizer bytes --split-documents lines --output "$1" >"$1.log" 2>&1 ||
    violation "no corpus: $(cat "$1.log")"
}

# The corpus of all trials, made once.
corpus() {
  [ -e "$root/tokens.idx" ] || (cd "$root" && make_corpus tokens)
  echo "$root/tokens"
}

# make_config FILE [LINE...]: a small model on the common corpus that saves every second step to
# ./run; further lines are appended (repeat the section's header). Steps take milliseconds.
make_config() {
  local file=$1 train
  train=$(corpus) || exit 1
  shift
  cat >"$file" <<END
[model]
preset = tiny
vocab_size = 260
hidden_size = 24
num_heads = 4
num_kv_heads = 2
head_dim = 8
num_experts = 8
top_k = 3
ffn_size = 20
context = 16
[data]
train = $train
sequence_length = 16
[train]
steps = 8
global_batch = 8
micro_batch = 2
[optim]
lr = 5e-3
warmup_steps = 2
[checkpoint]
interval = 2
[run]
dir = run
threads = 1
deterministic = true
[log]
tensorboard = false
END
  [ $# -eq 0 ] || printf '%s\n' "$@" >>"$file"
}

# train RANKS CONFIG [OPTION...]: a job; its output goes to ./log, its exit code is returned. A job
# that lasts longer than $limit seconds (120) is ended and counts as a hang. Each rank is started by
# $under, when that is set: `prlimit --fsize=9`, `env NAME=VALUE`.
train() {
  local ranks=$1 code
  shift
  # shellcheck disable=SC2086 # $under is words
  timeout -k 5 "${limit:-120}" mpirun --oversubscribe --bind-to none -np "$ranks" \
    ${under-} "$bin/moe-train" "$@" >log 2>&1
  code=$?
  [ "$code" = 124 ] && violation "the job hung: $(tail -n 3 log)"
  return "$code"
}

# The newest step that has a checkpoint in run folder $1 (run); 0 when there is none.
newest_step() {
  local last
  last=$(find "${1:-run}/checkpoints" -maxdepth 1 -name 'step-????????' 2>/dev/null | sort | tail -n1)
  last=${last##*/step-}
  echo $((10#0$last))
}

# The last step that a job's output said was saved; 0 for none.
acknowledged_step() {
  local step
  step=$(sed -n 's/.*checkpoint of step \([0-9]*\) saved.*/\1/p' "${1:-log}" | tail -n1)
  echo "${step:-0}"
}

# says TEXT [FILE]: the job's output has it.
says() {
  grep -qF -- "$1" "${2:-log}" || violation "not said: $1; the end was: $(tail -n 5 "${2:-log}")"
}

# curve [RUN]: "step loss" of each step from metrics.jsonl, in the order of the file.
curve() {
  sed -n 's/^{"step": \([0-9]*\), "tokens".*"loss": \([^,]*\),.*/\1 \2/p' "${1:-run}/metrics.jsonl"
}

# whole_curve STEPS [RUN]: every step 1..STEPS is there once, in order.
whole_curve() {
  curve "${2:-run}" | awk -v n="$1" '$1 != NR { bad = 1 } END { exit bad || NR != n }' ||
    violation "metrics.jsonl has not each of $1 steps once: $(curve "${2:-run}" | cut -d' ' -f1 | tr '\n' ' ')"
}
