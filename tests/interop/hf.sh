#!/bin/sh
# Does transformers read our exports as we mean them? Exit 77 (skipped) where it is not installed.
#
#   tests/interop/hf.sh [--keep FOLDER]
#
# The build folder is $MOE_BUILD, or build; the Python with transformers and torch $MOE_PYTHON, or
# python3: python3 -m venv V && V/bin/pip install transformers torch, then MOE_PYTHON=V/bin/python.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${MOE_PYTHON:-python3}
if ! "$python" -c 'import torch, transformers, tokenizers' 2>/dev/null; then
  echo "hf.sh: skipped: $python has no transformers, tokenizers and torch (see the head of this script)"
  exit 77
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 HF_HUB_OFFLINE=1
exec "$python" "$here/hf.py" --build "${MOE_BUILD:-$here/../../build}" "$@"
