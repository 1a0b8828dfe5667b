#!/bin/sh
# Build everything with warnings as errors and run all tests.
#
#   tests/run.sh [BUILD_DIR] [CTEST_ARGUMENT...]
#
# BUILD_DIR is `build` unless given; e.g. tests/run.sh build -R '^base' runs the base layer's tests.
set -eu
cd "$(dirname "$0")/.."
build=build
case "${1-}" in
-h | --help)
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 0
  ;;
'' | -*) ;;
*)
  build=$1
  shift
  ;;
esac

launcher=
if command -v ccache >/dev/null; then
  launcher="-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache"
fi
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DMOE_WERROR=ON $launcher
ninja -C "$build"
# mpirun refuses root otherwise; in a container root is all there is.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
exec ctest --test-dir "$build" --output-on-failure -j2 "$@"
