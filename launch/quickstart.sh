#!/bin/sh
# From a fresh Debian with git to a trained language model, in one command. `--help` says more.
set -eu
export LC_ALL=C # apt-cache's words are read

steps=
ranks=2
batch=8 # sequences per step, over all ranks: the loss curve is the same on any number of them

usage() {
  cat <<'END'
Usage: launch/quickstart.sh [--steps N] [--ranks N]

Installs what is missing (Debian packages), builds, fetches 4 MB of English (the King James Bible,
from the packages bible-kjv and bible-kjv-text), trains a tokenizer of 4096 pieces, turns the text
into tokens and trains a 28 M parameter mixture-of-experts model on it. About 8 minutes on two
cores, 3 of them training. What is done already is skipped; an interrupted run goes on.

  --steps N   optimizer steps (default: as launch/configs/quickstart.ini says)
  --ranks N   processes: 1, 2, 4 or 8 (default 2)

Everything is kept in runs/quickstart; remove that folder to start anew.
END
}

fail() {
  echo "quickstart: $*" >&2
  exit 1
}

bad_usage() {
  echo "quickstart: $*: command line: see launch/quickstart.sh --help" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case "$1" in
  --help | -h)
    usage
    exit 0
    ;;
  --steps | --ranks)
    case "${2-}" in
    '' | 0* | *[!0-9]* | ????????*) bad_usage "$1 needs a number from 1" ;;
    esac
    if [ "$1" = --steps ]; then steps=$2; else ranks=$2; fi
    shift 2
    ;;
  *) bad_usage "unknown option: $1" ;;
  esac
done
case "$ranks" in
1 | 2 | 4 | 8) ;;
*) bad_usage "--ranks must divide the $batch sequences of a step: 1, 2, 4 or 8, not $ranks" ;;
esac

cd "$(dirname "$0")/.."
work=runs/quickstart
build="build-cpu" # of the preset cpu
config=launch/configs/quickstart.ini
started=$(date +%s)
mkdir -p "$work"

say() {
  printf '\n== %s  (%d s)\n' "$*" $(($(date +%s) - started))
}

# Runs a command quietly; what it said appears when it fails.
quietly() {
  if ! "$@" >"$work/log" 2>&1; then
    tail -n 30 "$work/log" >&2
    fail "failed: $*: all of its output is in $work/log"
  fi
}

# ---- the steps -----------------------------------------------------------------------------------

build_programs() {
  # The CPU backend alone: compiling CUDA kernels would take longer than all the rest.
  quietly cmake --preset cpu
  targets=
  for source in launch/moe_*.c; do
    targets="$targets $(basename "$source" .c | tr _ -)"
  done
  # shellcheck disable=SC2086
  quietly cmake --build "$build" --target $targets
}

# The program `bible` prints the text. Unpacking it here needs no root.
fetch_bible() {
  folder=$work/packages
  mkdir -p "$folder"
  needed=$(apt-cache depends bible-kjv 2>/dev/null | sed -n 's/^ *Depends: \([^<]*\)$/\1/p')
  user=$(id -un) # apt's own user may not write to our folder
  # shellcheck disable=SC2046,SC2086
  (cd "$folder" && apt-get -q -o "APT::Sandbox::User=$user" download bible-kjv \
    $(echo $needed | tr ' ' '\n' | grep -vx libc6)) >"$work/log" 2>&1 ||
    fail "cannot download the package bible-kjv: see $work/log: run 'apt-get update' as root, or" \
      "put any text into $work/corpus.txt, with a blank line between documents"
  for package in "$folder"/*.deb; do
    dpkg-deb -x "$package" "$folder/root"
  done
}

# One verse per line, a blank line after each chapter: a chapter is a document.
make_corpus() {
  fetch_bible
  root=$work/packages/root
  libraries=$(find "$root" -name 'libreadline.so*' -exec dirname {} \; | sort -u)
  LD_LIBRARY_PATH=$libraries "$root/usr/bin/bible" -f -p "$root/usr/lib" gen1:1-rev22:21 \
    </dev/null >"$work/verses" || fail "cannot print the text: $root/usr/bin/bible"
  verses=$(wc -l <"$work/verses")
  [ "$verses" -eq 31102 ] || fail "$work/verses has $verses verses, not 31102: remove $work"
  awk '{ chapter = $1; sub(/:.*/, "", chapter); sub(/^[^ ]* /, "") }
       NR > 1 && chapter != last { print "" }
       { last = chapter; print }' "$work/verses" >"$work/corpus.tmp"
  mv "$work/corpus.tmp" "$work/corpus.txt"
  rm "$work/verses"
}

train() {
  set -- --set "train.micro_batch=$((batch / ranks))" --set "train.global_batch=$batch"
  if [ -n "$steps" ]; then
    set -- "$@" --set "train.steps=$steps"
    [ "$steps" -ge 100 ] || set -- "$@" --set "optim.warmup_steps=$((steps / 5))"
  fi
  if [ "$(id -u)" -eq 0 ]; then # as in containers
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  code=0
  # Each rank computes with several threads: bound to one core they would stand in a queue.
  mpirun --oversubscribe --bind-to none -np "$ranks" "$build/bin/moe-train" "$config" "$@" ||
    code=$?
  case $code in
  0) ;;
  75) echo "quickstart: stopped after saving: run launch/quickstart.sh again to go on" >&2 ;;
  *) echo "quickstart: training failed (exit $code)" >&2 ;;
  esac
  [ $code -eq 0 ] || exit $code
}

# Prints "STEP LOSS" of each step in metrics.jsonl.
losses() {
  sed -n 's/^{"step": \([0-9]*\),.*"loss": \([^,]*\),.*/\1 \2/p' "$work/run/metrics.jsonl"
}

# ---- in order ------------------------------------------------------------------------------------

say "Packages"
launch/setup.sh

say "Build: $build"
build_programs

say "Text: $work/corpus.txt"
[ -f "$work/corpus.txt" ] || make_corpus
wc -c "$work/corpus.txt"

say "Tokenizer: $work/tokenizer.model"
[ -f "$work/tokenizer.model" ] ||
  "$build/bin/moe-data" train-tokenizer --input "$work/corpus.txt" --vocab-size 4096 \
    --split-documents blank-lines --output "$work/tokenizer"

say "Tokens: $work/tokens.bin, $work/tokens.idx"
[ -f "$work/tokens.idx" ] ||
  "$build/bin/moe-data" tokenize --input "$work/corpus.txt" --tokenizer "$work/tokenizer.model" \
    --split-documents blank-lines --output "$work/tokens"

say "Train: $ranks ranks, $config"
train

say "Done"
losses | awk '
  NR == 1 { printf "loss at step %d: %.4f (knowing nothing: ln 4096 = 8.32)\n", $1, $2 }
  { step = $1; loss = $2 }
  END { if (NR > 0) printf "loss at step %d: %.4f\n", step, loss }'
sed -n 's/^{"step": \([0-9]*\), "eval_ce": \([^,]*\),.*/\1 \2/p' "$work/run/metrics.jsonl" | tail -n 1 |
  awk '{ printf "on text it has not seen, after step %d: %.4f\n", $1, $2 }'
cat <<END

checkpoints   $work/run/checkpoints
metrics       $work/run/metrics.jsonl, $work/run/tensorboard (tensorboard --logdir $work/run)
settings      $work/run/config.ini, explained in docs/config.md

To try next:
  launch/quickstart.sh --ranks 4            the same loss curve on more processes (remove
                                            $work/run first)
  $build/bin/moe-train $config --dry-run
                                            the plan: sizes, memory, who owns which expert
END
[ ! -x "$build/bin/moe-generate" ] || cat <<END
  $build/bin/moe-generate --checkpoint $work/run --prompt 'And the LORD said'
                                            text from the model
END
