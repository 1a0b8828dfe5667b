# shellcheck shell=bash disable=SC2154 # sourced by run.sh: bin, root, here, build
# Faults of machines: a job on three hosts of a simulated cluster (cluster.sh) loses some of them.

# make_cluster: hosts h1..h3 in ./cluster for this trial.
make_cluster() {
  "$here/cluster.sh" up cluster 3 || violation "no cluster"
  trap '"$here/cluster.sh" down cluster' EXIT
  # shellcheck disable=SC1091 # made just now
  . cluster/env
  # The fault is to show in seconds here.
  export OMPI_MCA_oob_tcp_keepalive_time=3 OMPI_MCA_oob_tcp_keepalive_intvl=1
  export OMPI_MCA_oob_tcp_keepalive_probes=2
}

need_namespaces() {
  [ "$(cat cluster/kind)" = namespaces ] && return
  echo "network namespaces are not permitted here"
  exit 77
}

# 6 ranks, or 4, or 2: always 12 sequences in a step. With the balance loss per sequence it does not
# matter how many of them are in one pass, so the curves must agree to rounding.
cluster_config() {
  make_config cfg.ini '[train]' 'aux_scope = sequence'
  sed -i -e 's/^steps = .*/steps = 100/' -e 's/^global_batch = .*/global_batch = 12/' \
    -e 's/^micro_batch = .*/micro_batch = 1/' -e 's/^interval = .*/interval = 10/' cfg.ini
}

# The run nothing happened to, made once.
uninterrupted() {
  [ -e "$root/uninterrupted/finished" ] || (
    mkdir -p "$root/uninterrupted" && cd "$root/uninterrupted" || exit 1
    cluster_config
    train 6 cfg.ini && touch finished
  ) || violation "the uninterrupted run failed"
}

same_curve() { # RUN RUN: to rounding
  local worst
  worst=$(paste <(curve "$1") <(curve "$2") | awk '
    NF != 4 || $1 != $3 { print "steps differ"; bad = 1; exit }
    { d = ($2 - $4) / $2; if (d < 0) d = -d; if (d > worst) worst = d }
    END { if (!bad) print worst }')
  awk -v w="$worst" 'BEGIN { exit !(w ~ /^[0-9.e-]+$/ && w < 1e-6) }' ||
    violation "the curve departs from the uninterrupted one: $worst"
}

wait_for_steps() { # N
  local i
  for ((i = 0; i < 600; i++)); do
    [ "$(curve 2>/dev/null | wc -l)" -lt "$1" ] || return 0
    sleep 0.05
  done
  violation "no $1 steps: $(tail -n 5 log)"
}

# lose ACTION TRIAL HOST...: the hosts go while the job is at its step 20 to 60.
lose() {
  local action=$1 trial=$2 host job code left
  shift 2
  make_cluster
  [ "$action" = off ] || need_namespaces
  uninterrupted
  cluster_config
  timeout -k 5 "${limit:-180}" "$here/../../launch/moe-run" --program "$bin/moe-train" --elastic \
    --backoff 0 --hosts h1:2,h2:2,h3:2 cfg.ini >log 2>&1 &
  job=$!
  wait_for_steps $((20 + trial * 7 % 40))
  for host in "$@"; do "$here/cluster.sh" "$action" cluster "$host"; done
  wait "$job"
  code=$?
  left=$((6 - 2 * $#))
  [ "$code" = 0 ] || violation "exit code $code: $(grep moe-run log)"
  says "no answer from: $*"
  says "$left of 6 ranks"
  grep -q "resuming after step [1-9]" log || violation "it began anew: $(grep moe-run log)"
  whole_curve 100
  same_curve "$root/uninterrupted/run" run
}

host_off() { # a different one each time: h1 has rank 0
  lose off "$1" "h$((1 + $1 % 3))"
}
fault "a host is switched off" 1 6 host_off \
  "elastic: goes on from the last checkpoint on the two that are left; same curve to 1e-6"

host_cut() {
  lose cut "$1" "h$((1 + ($1 + 1) % 3))"
}
fault "a host's network cable is pulled" 1 6 host_cut "the same, within the keep-alive time"

two_hosts_off() {
  lose off "$1" h2 h3
}
fault "two of three hosts are switched off" 0 3 two_hosts_off "the same, on one host"

# The one fault of file systems that a run would not notice before it is resumed.
unshared() {
  local host=h$((1 + $1 % 3)) code
  make_cluster
  need_namespaces
  cluster_config
  mkdir run
  "$here/cluster.sh" own cluster "$host" run
  "$here/../../launch/moe-run" --program "$bin/moe-train" --preflight --hosts h1:2,h2:2,h3:2 \
    cfg.ini >log 2>&1
  code=$?
  [ "$code" = 1 ] || violation "exit code $code: $(cat log)"
  grep -Eq "^run directory +FAIL +rank [0-9] .(h1|h2|h3).: run/.preflight/rank-.* is not seen here" log ||
    violation "not named: $(cat log)"
}
fault "a host does not share the run directory" 0 3 unshared "preflight names it, exit 1"
