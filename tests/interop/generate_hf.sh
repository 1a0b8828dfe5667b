#!/bin/sh
# Does moe-generate write what transformers writes? Exit 77 (skipped) where it is not installed. The
# build folder is $MOE_BUILD, or build; the Python with transformers and torch $MOE_PYTHON, or python3.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${MOE_PYTHON:-python3}
if ! "$python" -c 'import torch, transformers' 2>/dev/null; then
  echo "generate_hf.sh: skipped: $python has no transformers and torch (tests/interop/hf.sh says how)"
  exit 77
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 HF_HUB_OFFLINE=1
exec "$python" "$here/generate_hf.py" --build "${MOE_BUILD:-$here/../../build}"
