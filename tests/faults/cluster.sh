#!/bin/bash
# A cluster on one machine: hosts with their own network, name and temporary folder, which can be
# cut off or switched off while a job runs on them.
#
#   cluster.sh up DIR N          make hosts h1..hN, described in DIR; DIR/env is to be sourced
#   cluster.sh cut DIR HOST      pull its network cable: its processes go on, nobody hears of them
#   cluster.sh off DIR HOST      switch it off: its processes die without a word
#   cluster.sh on DIR HOST       it is back
#   cluster.sh own DIR HOST PATH what it has at PATH is not shared with the others any more
#   cluster.sh down DIR          remove all of it
#   cluster.sh rsh DIR HOST CMD  what ssh would do: mpirun starts its daemons with it
#
# A host is a network namespace, joined to the others and to this machine by a bridge. Where
# namespaces are not permitted a host is only a name: its daemon runs here, with a folder of its
# own, and Open MPI takes it for another machine all the same; `cut` then is `off`. DIR/kind says
# which it is: `namespaces` (needs root) or `names` (also when MOE_CLUSTER_KIND asks for it).
set -eu

fail() {
  echo "cluster.sh: $*" >&2
  exit 1
}

[ $# -ge 2 ] || { sed -n '2,17s/^# \{0,1\}//p' "$0" && exit 2; }
action=$1 dir=$(realpath -m "$2") name=${3-}
self=$(realpath "$0")

# ---- making and removing -------------------------------------------------------------------------

add_host() { # NUMBER
  ip netns add "$tag-h$1" && ip link add "$tag-$1" type veth peer name eth0 netns "$tag-h$1" &&
    ip link set "$tag-$1" master "$tag" up && ip -n "$tag-h$1" link set lo up &&
    ip -n "$tag-h$1" address add "$net.$((100 + $1))/24" dev eth0 &&
    ip -n "$tag-h$1" link set eth0 up
}

add_network() { # HOSTS
  local i
  ip link add "$tag" type bridge && ip address add "$net.1/24" dev "$tag" &&
    ip link set "$tag" up || return 1
  for ((i = 1; i <= $1; i++)); do add_host "$i" || return 1; done
}

up() { # HOSTS
  local i
  mkdir -p "$dir"
  local btl=self,vader,tcp
  tag=moe$((BASHPID % 100000)) net=10.77.$((BASHPID % 250 + 1))
  echo "$tag" >"$dir/tag"
  for ((i = 1; i <= $1; i++)); do mkdir -p "$dir/h$i/tmp"; done
  if [ "${MOE_CLUSTER_KIND-}" != names ] && add_network "$1" 2>"$dir/why"; then
    echo namespaces >"$dir/kind"
  else
    remove_network
    echo names >"$dir/kind"
    net=127.0.0 btl=self,tcp # names of shared memory would clash
  fi
  # shellcheck disable=SC2016 # expanded when it runs
  printf '#!/bin/sh\nhost=$1\nshift\nexec %q rsh %q "$host" "$@"\n' "$self" "$dir" >"$dir/rsh"
  chmod +x "$dir/rsh"
  cat >"$dir/env" <<END
export OMPI_MCA_plm_rsh_agent='$dir/rsh' OMPI_MCA_orte_keep_fqdn_hostnames=1
export OMPI_MCA_oob_tcp_if_include=$net.0/24 OMPI_MCA_btl_tcp_if_include=$net.0/24
export OMPI_MCA_btl=$btl
END
}

# Links first: connections that were cut keep a deleted namespace for a while.
remove_network() {
  local space link
  for link in /sys/class/net/"$tag" /sys/class/net/"$tag"-*; do
    ip link delete "$(basename "$link")" 2>/dev/null || true
  done
  for space in $(ip netns list 2>/dev/null | awk -v t="$tag-" 'index($1, t) == 1 { print $1 }'); do
    ip netns delete "$space" || true
  done
}

# ---- processes -----------------------------------------------------------------------------------

processes() { # HOST: what was started there carries the host's folder in its environment
  local place
  for place in /proc/[0-9]*/environ; do
    if grep -qzxF "MOE_HOST=$dir/$1" "$place" 2>/dev/null; then
      place=${place%/environ}
      echo "${place#/proc/}"
    fi
  done
}

end_processes() { # HOST; again, for those that were being started
  local list number
  for _ in 1 2 3 4 5; do
    list=$(processes "$1")
    [ -n "$list" ] || return 0
    # A machine's shared memory goes with it.
    for number in $list; do
      awk '$6 ~ /^.dev.shm.vader/ { print $6 }' "/proc/$number/maps" 2>/dev/null | sort -u |
        xargs -r rm -f
    done
    # shellcheck disable=SC2086
    kill -9 $list 2>/dev/null || true
    sleep 0.1
  done
}

known() {
  if [ -z "$name" ] || [ ! -d "$dir/$name" ]; then fail "no host $name in $dir"; fi
  kind=$(cat "$dir/kind") tag=$(cat "$dir/tag")
}

# The number of a host's link is the host's.
link() { # STATE
  [ "$kind" = names ] || ip link set "$tag-${name#h}" "$1"
}

run_there() { # COMMAND...
  [ ! -e "$dir/$name/gone" ] || exit 255
  # As with ssh, nothing of the caller's environment comes along.
  local clean=(env -i HOME="$HOME" PATH="$PATH" MOE_HOST="$dir/$name" TMPDIR="$dir/$name/tmp")
  if [ "$kind" = names ]; then exec "${clean[@]}" sh -c "$*"; fi
  # shellcheck disable=SC2016
  exec "${clean[@]}" ip netns exec "$tag-$name" unshare --uts --mount sh -c '
    hostname "$1"
    [ ! -e "$2" ] || mount -t tmpfs none "$(cat "$2")"
    shift 2
    exec sh -c "$*"' sh "$name" "$dir/$name/own" "$@"
}

case $action in
up) up "$3" ;;
cut | off)
  known
  touch "$dir/$name/gone"
  link down
  if [ "$action" = off ] || [ "$kind" = names ]; then end_processes "$name"; fi
  ;;
on)
  known
  end_processes "$name"
  link up
  rm -f "$dir/$name/gone"
  ;;
own)
  known
  [ "$kind" = namespaces ] || fail "no namespaces here"
  realpath "$4" >"$dir/$name/own"
  ;;
down)
  tag=$(cat "$dir/tag")
  for place in "$dir"/h*/; do end_processes "$(basename "$place")"; done
  remove_network
  rm -rf "$dir"
  ;;
rsh)
  known
  shift 3
  run_there "$@"
  ;;
*) fail "$action: up, cut, off, on, own, down or rsh" ;;
esac
