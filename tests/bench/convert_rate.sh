#!/bin/bash
# How fast moe-convert writes and proves, beside dd with fsync into the same folder.
#
#   tests/bench/convert_rate.sh BUILD_DIR [OPTION...]
#
# OPTIONs go to moe-train and choose the model that is converted (default: 2 layers of 6.9b in bf16, a
# checkpoint of 6.6 GiB). The checkpoint is in memory (/dev/shm; $CONVERT_FROM), what is made goes to
# the disk that is measured (/tmp; $CONVERT_TO). RANKS (1) is what moe-train is started on. Each command
# prints what it says of itself, then its seconds in all, the processors' and its peak memory.
set -eu
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2; }
bin=$1/bin
shift
[ $# -gt 0 ] || set -- --set model.preset=6.9b --set model.num_layers=2 --set precision.dtype=bf16
. "$(dirname "$0")/small_run.sh"
from=$(mktemp -d "${CONVERT_FROM:-/dev/shm}/convert-rate-XXXXXX")
to=$(mktemp -d "${CONVERT_TO:-/tmp}/convert-rate-XXXXXX")
trap 'rm -rf "$from" "$to"' EXIT

small_run "$bin" "$to" "$from/run" 1
said() { grep -E 'saved|written|imported|proof|equal' "$to/log" | sed 's/^moe-[a-z]*: /  /'; }
run() { "$@" >"$to/log" 2>&1 || { cat "$to/log" >&2 && exit 1; }; }
run mpirun --oversubscribe --bind-to none -np "${RANKS:-1}" "$bin/moe-train" "$to/cfg.ini" "$@"
said
shards=("$from"/run/checkpoints/step-*/shard-*)

plain() {
  sync "$to" && sleep 2
  dd if="${shards[0]}" of="$to/dd" bs=1M count=4000 conv=fsync 2>&1 | sed -n 's/^/  dd: /;$p'
  rm "$to/dd"
}

convert() {
  sync "$to" && sleep 2
  local name="$1 ${*:4}"
  run command time -f '%e s, processors %U + %S s, peak %M KiB' "$bin/moe-convert" "$1" "$2" --output "$to/$3" "${@:4}"
  echo "$name: $(tail -n 1 "$to/log")"
  said
}

plain
convert export-hf "$from/run" fp32 --dtype fp32 --tokenizer none
convert import-hf "$to/fp32" fp32-run
rm -rf "$to"/fp32*
convert export-hf "$from/run" bf16 --dtype bf16 --tokenizer none
convert import-hf "$to/bf16" bf16-run
rm -rf "$to"/bf16*
convert export-gguf "$from/run" bf16.gguf --dtype bf16 --tokenizer none
convert export-gguf "$from/run" q8_0.gguf --dtype q8_0 --tokenizer none
rm -f "$to"/*.gguf
plain
convert reshard "$from/run" four --ranks 4
