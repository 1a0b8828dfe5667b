#!/bin/bash
# What each optimisation is worth: a training step with it off, all others on.
#
#   tests/bench/ablation.sh RANKS PROGRAM [LAUNCHER...]    RANKS GPUs of this host; of moe-bench
#   tests/bench/ablation.sh 2 build/bin/moe-bench
#   tests/bench/ablation.sh 2 .gpu/bin/moe-bench .gpu/run  through what finds its libraries
#   ONLY='experts lanes' tests/bench/ablation.sh ...       these lines (first words below)
#   MORE='--steps 8' tests/bench/ablation.sh ...           more options of moe-bench, for all
#
# Preset 6.9b, bf16, 4 sequences of 4096 tokens per rank; a line takes about 12 seconds, and fails
# after LIMIT (40). Ends with a table: the median of a step and its difference from the first
# line's; the last line is the first once more and says what differences mean nothing. Ends with 1
# when a line failed; why is told as it happens.
set -u
[ $# -ge 2 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 2; }
ranks=$1 program=$2
shift 2
case $ranks in
'' | *[!0-9]* | 0) echo "ablation.sh: RANKS must be a number from 1: $ranks" >&2 && exit 2 ;;
esac
launcher=("$@")
read -r -a more <<<"${MORE:-}"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 base=

# step SETTING...: seconds of a step. A setting is of the environment, NAME=value, or of the
# configuration, section.key=value.
step() {
  local variables=() options=() setting
  for setting in "$@"; do
    case $setting in
    *.*=*) options+=(--set "$setting") ;;
    *) variables+=("$setting") ;;
    esac
  done
  rm -f "$work/json"
  timeout -k 5 "${LIMIT:-40}" env "${variables[@]}" "${launcher[@]}" mpirun --oversubscribe --bind-to none -np "$ranks" \
    "$program" --set model.preset=6.9b --set precision.dtype=bf16 --set train.recompute=auto \
    --set data.sequence_length=4096 --set train.micro_batch=4 --steps 4 --warmup 2 \
    --no-collectives --json "$work/json" "${options[@]}" "${more[@]}" >"$work/log" 2>&1 &&
    sed -n 's/.*"step_seconds": \([0-9.e+-]*\).*/\1/p' "$work/json"
}

# off KEY TEXT SETTING...: a line of the table.
off() {
  local key=$1 text=$2 seconds
  shift 2
  case " all ${ONLY:-$key} " in
  *" $key "*) ;;
  *) return ;;
  esac
  seconds=$(step "$@")
  echo "ablation.sh: $key: ${seconds:-FAILED}" >&2
  if [ -z "$seconds" ]; then
    printf '%-9s %-46s FAILED\n' "$key" "$text" >>"$work/table"
    tail -n 15 "$work/log" >&2
    failed=1
    [ -n "$base" ] || exit 1
    return
  fi
  base=${base:-$seconds}
  awk -v key="$key" -v text="$text" -v s="$seconds" -v base="$base" 'BEGIN {
    printf "%-9s %-46s %8.1f %+8.1f %+7.1f %%\n", key, text, 1e3 * s, 1e3 * (s - base),
      100 * (s / base - 1) }' >>"$work/table"
}

printf '%-9s %-46s %8s %8s %9s\n' "" "without ($ranks ranks)" "ms/step" "ms" "%" >"$work/table"
off all "nothing: all are on"
off experts "Hopper's expert kernels: cuBLAS per expert" MOE_EXPERT_GEMM=cublas
off router "the one-pass router, forward and backward" MOE_PLAIN=router
off squares "gradients squared as they are stored" MOE_PLAIN=squares
off joint "norms, routers and moves of rows in pairs" MOE_PLAIN=joint
off overlap "small kernels that begin before the one before ends" MOE_PLAIN=overlap
off norm "rms_norm_backward by a warp for a row" MOE_PLAIN=norm
off gather "rows taken in an order that the cache likes" MOE_PLAIN=gather
off hopper "our attention for Hopper: cuDNN's" MOE_ATTENTION=cudnn
off cudnn "our attention for Hopper: that for all tensor cores" MOE_ATTENTION=mma
off tensor "attention on tensor cores: float32 kernels" MOE_ATTENTION=exact
off lanes "lanes: exchanges and sums of gradients in the main one" MOE_LANES=off
if [ "$ranks" -eq 1 ]; then
  off graphs "device graphs" run.graphs=false
else
  off gathered "all-gather: all-to-all of the chosen tokens" parallel.exchange=alltoall
  off engines "copy engines: NCCL's kernels carry exchanges" NCCL_CTA_POLICY=0
fi
off all "nothing, again"
cat "$work/table"
exit $failed
