#!/bin/bash
# A training step on more and more GPUs, and what the exchange between them costs.
#
#   tests/bench/scaling.sh NP... [PROGRAM [LAUNCHER...]]    numbers of GPUs of this host; moe-bench
#   tests/bench/scaling.sh 1 2 4 build/bin/moe-bench
#   tests/bench/scaling.sh 4 .gpu/bin/moe-bench .gpu/run    through what finds its libraries
#   SHAPES='4096x4' tests/bench/scaling.sh ...              sequence length x micro-batch (4096x4 32768x1)
#   ONLY='auto groups' tests/bench/scaling.sh ...           these rows (auto alltoall pairs serial
#                                                           groups balanced)
#   MORE='--steps 8' tests/bench/scaling.sh ...             more options of moe-bench, for all
#   MORE='--set model.preset=tiny' SHAPES=64x4 tests/bench/scaling.sh 4    a trial without GPUs
#
# Preset 6.9b, bf16, real routing from initial weights. Rows: as the program chooses (auto); by
# all-to-all, which sends a token once to each rank; the same once for each expert (pairs); without
# lanes, so that no exchange hides behind arithmetic (serial); two groups of half the ranks, each
# with all experts (groups); tokens dealt to the experts in turn (balanced), which is what uneven
# routing costs. A rank that holds all experts keeps their gradients and moments in bf16.
#
# Prints a markdown table. exchange: what arithmetic waits for exchanges per step, mean of the ranks;
# waits: what of it is waiting for slower ranks, at least (the mean less the rank that waits least);
# recomputed: experts of so many layers. A row may take 50 seconds. Ends with 1 when one failed.
set -u
usage() { sed -n '2,22s/^# \{0,1\}//p' "$0" && exit 2; }
counts=()
while [ $# -gt 0 ]; do
  case $1 in
  *[!0-9]* | 0 | '') break ;;
  esac
  counts+=("$1") && shift
done
[ ${#counts[@]} -gt 0 ] || usage
program=${1:-build/bin/moe-bench}
shift $(($# > 0))
launcher=("$@")
[ -x "$program" ] || { echo "scaling.sh: no program: $program" >&2 && exit 2; }
read -r -a more <<<"${MORE:-}"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# value KEY: of the last row's JSON.
value() { sed -n 's/.*"'"$1"'": "\{0,1\}\([^,"]*\).*/\1/p' "$work/json"; }

print_row() {
  awk -v n="$1" -v shape="$2" -v key="$3" -v ep="$(value ep)" -v exchange="$(value exchange)" \
    -v state="$(value moment_dtype)" -v recomputed="$(value recomputed_experts)" \
    -v blocks="$(value recomputed_blocks)" -v s="$(value step_seconds)" -v tokens="$(value tokens)" \
    -v mfu="$(value mfu)" -v wait="$(value exchange_seconds)" \
    -v least="$(value exchange_least_seconds)" -v planned="$(value planned_bytes)" \
    -v used="$(value used_bytes)" 'BEGIN {
    printf "| %s | %s | %s | %d x %d | %s | %s | %s%s | %.1f | %.0f | %s | %.1f | %.1f | %.1f | %.1f |\n",
      n, shape, key, ep, n / ep, exchange, state, recomputed,
      (blocks > 0 ? " and " blocks " blocks" : ""), 1e3 * s, tokens / s / n,
      (mfu > 0 ? sprintf("%.1f %%", 100 * mfu) : "-"), 1e3 * wait, 1e3 * (wait - least),
      planned / 2^30, used / 2^30 }'
}

# row KEY GPUS SHAPE SETTING...: a row of the table. A setting is of the environment, NAME=value, of
# the configuration, section.key=value, or an option of moe-bench.
row() {
  local key=$1 n=$2 shape=$3 variables=() options=() setting
  shift 3
  case " ${ONLY:-$key} " in
  *" $key "*) ;;
  *) return ;;
  esac
  for setting in "$@"; do
    case $setting in
    --*) options+=("$setting") ;;
    *.*=*) options+=(--set "$setting") ;;
    *) variables+=("$setting") ;;
    esac
  done
  rm -f "$work/json"
  if timeout -k 5 50 env "${variables[@]}" "${launcher[@]}" mpirun --oversubscribe --bind-to none \
    -np "$n" "$program" --set model.preset=6.9b --set precision.dtype=bf16 \
    --set train.recompute=auto --set data.sequence_length="${shape%x*}" \
    --set train.micro_batch="${shape#*x}" --steps 4 --warmup 2 --no-collectives \
    --json "$work/json" "${options[@]}" "${more[@]}" >"$work/log" 2>&1; then
    print_row "$n" "$shape" "$key" || failed=1
  else
    echo "| $n | $shape | $key | | FAILED ($?) | | | | | | | | | |"
    failed=1
    { grep '^moe-bench' "$work/log" || tail -n 8 "$work/log"; } >&2
  fi
}

state='precision.grad_dtype=bf16 precision.moment_dtype=bf16'
echo "| GPUs | S x micro-batch | row | ep x edp | exchange | moments | recomputed | ms/step | tokens/s/GPU | MFU | exchange, ms | waits, ms | planned, GiB | used, GiB |"
echo "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
for n in "${counts[@]}"; do
  for shape in ${SHAPES:-4096x4 32768x1}; do
    if [ "$n" -eq 1 ]; then
      # shellcheck disable=SC2086 # two settings
      row auto 1 "$shape" $state
      continue
    fi
    row auto "$n" "$shape"
    row alltoall "$n" "$shape" parallel.exchange=alltoall
    row pairs "$n" "$shape" parallel.exchange=alltoall MOE_DEDUP=off
    row serial "$n" "$shape" MOE_LANES=off
    half=$((n / 2)) groups=()
    [ $half -gt 1 ] || read -r -a groups <<<"$state"
    [ $((n % 2)) -eq 1 ] || row groups "$n" "$shape" parallel.ep=$half "${groups[@]}"
    row balanced "$n" "$shape" --balanced
  done
done
exit $failed
