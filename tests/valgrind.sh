#!/bin/sh
# One training step on two ranks under valgrind, which must find nothing in it.
#
#   tests/valgrind.sh [BUILD_DIR]      build-valgrind unless given; about two minutes
#
# Builds for x86-64-v3, because valgrind does not know AVX-512.
set -eu
cd "$(dirname "$0")/.."
build=${1:-build-valgrind}
cmake -S . -B "$build" -G Ninja -DMOE_CUDA=OFF -DMOE_CPU_ARCH=x86-64-v3 >/dev/null
ninja -C "$build" moe-train moe-data
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
"$build"/bin/moe-data tokenize --input README.md docs/*.md --tokenizer bytes --split-documents blank-lines \
  --output "$run"/tokens
cat >"$run"/cfg.ini <<CFG
[model]
preset = tiny
vocab_size = 260
context = 8
[data]
train = $run/tokens
[train]
steps = 1
[optim]
warmup_steps = 1
[log]
peak_tflops = 1
[run]
dir = $run/run
threads = 1
CFG
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OPENBLAS_CORETYPE=Haswell
mpirun --oversubscribe -np 2 valgrind -q --fair-sched=yes --error-exitcode=99 \
  --suppressions=tests/support/valgrind.supp \
  --suppressions=/usr/share/openmpi/openmpi-valgrind.supp "$build"/bin/moe-train "$run"/cfg.ini
echo "valgrind found nothing"
