# For benchmarks of checkpoints, which source it: what a run of few and short steps reads.
#
#   small_run BIN FOLDER RUN STEPS: FOLDER/cfg.ini for a run of STEPS steps in the folder RUN, on a
#   text of bytes in FOLDER/tokens; what moe-data said is left in FOLDER/log.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

small_run() {
  local bin=$1 folder=$2 run=$3 steps=$4 i
  cat >"$folder/cfg.ini" <<END
[model]
preset = small
[data]
train = $folder/tokens
sequence_length = 32
valid_fraction = 0
[train]
micro_batch = 1
steps = $steps
[optim]
warmup_steps = 1
[run]
dir = $run
[log]
tensorboard = false
END
  for ((i = 0; i < 4000; i++)); do echo "Line $i of a text that nobody reads."; done >"$folder/text"
  "$bin/moe-data" tokenize --input "$folder/text" --tokenizer bytes --output "$folder/tokens" \
    >"$folder/log" 2>&1 || { cat "$folder/log" >&2 && exit 1; }
}
