#!/bin/sh
# Install the Debian packages the project is built with: only those that are missing.
#
#   launch/setup.sh         to build, test and run
#   launch/setup.sh --ci    also what continuous integration needs
set -eu

packages="cmake ninja-build gcc g++ pkg-config
  libopenmpi-dev openmpi-bin libhdf5-dev libopenblas-openmp-dev libinih-dev libcjson-dev
  libxxhash-dev libprotobuf-c-dev protobuf-c-compiler libcriterion-dev libsentencepiece-dev
  sentencepiece ccache"
ci_packages="clang-format clang-tidy clang valgrind procps libclang-rt-14-dev libomp-14-dev"

case "${1-}" in
'') ;;
--ci) packages="$packages $ci_packages" ;;
*)
  echo "usage: launch/setup.sh [--ci]" >&2
  exit 2
  ;;
esac

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "setup.sh: not root and no sudo: run as root: $*" >&2
    exit 1
  fi
}

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup.sh: this is not Debian: install what corresponds to:" $packages >&2
  exit 1
fi

missing=
for package in $packages; do
  state=$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null) || state=
  case "$state" in
  ii*) ;;
  *) missing="$missing $package" ;;
  esac
done

if [ -n "$missing" ]; then
  echo "setup.sh: installing$missing"
  as_root apt-get update -q
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
else
  echo "setup.sh: nothing to install"
fi

# Beside another OpenBLAS the OpenMP build must be the one in use: the threads of the pthread build
# know nothing of ours and both would fight for the cores.
for link in libopenblas.so libopenblas.so.0; do
  for name in $(update-alternatives --get-selections | awk -v l="$link-" 'index($1, l) == 1 {print $1}'); do
    now=$(update-alternatives --query "$name" | sed -n 's/^Value: //p')
    wanted=$(update-alternatives --list "$name" | grep /openblas-openmp/ || true)
    if [ -n "$wanted" ] && [ "$now" != "$wanted" ]; then
      echo "setup.sh: $name: from $now to $wanted"
      as_root update-alternatives --set "$name" "$wanted"
    fi
  done
done
