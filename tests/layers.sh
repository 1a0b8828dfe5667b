#!/bin/sh
# Includes may only point left:
#
#   core/base < kernels < parallel < data < core/model < checkpoint < core/train < launch
#
#   layers.sh [ROOT]       check the tree; every violation is printed as file:line: reason
#   layers.sh --self-test  plant violations in a copy of a small tree and see each one found
#
# Also: kernels/backend.h is private to kernels/, and MOE_WITH_CUDA is tested only in
# kernels/device.c and in parallel/ (which chooses between NCCL and MPI).
set -eu

layers="core/base kernels parallel data core/model checkpoint core/train launch"

# Reads "file:line:text" of every include and every mention of MOE_WITH_CUDA in a condition.
judge() {
  awk -v layers="$layers" '
    BEGIN { n = split(layers, name, " "); for (i = 1; i <= n; i++) rank[name[i]] = i }
    function layer_of(path,    i) {
      for (i = 1; i <= n; i++) if (index(path, name[i] "/") == 1) return name[i]
      return ""
    }
    function bad(reason) { print file ":" line ": " reason; found = 1 }
    {
      file = $0; sub(/:.*/, "", file)
      rest = substr($0, length(file) + 2)
      line = rest; sub(/:.*/, "", line)
      text = substr(rest, length(line) + 2)
      if (text !~ /^[ \t]*#[ \t]*include/) {
        if (file != "kernels/device.c" && file !~ /^parallel\//)
          bad("MOE_WITH_CUDA: choose backends in kernels/device.c only")
        next
      }
      if (!match(text, /"[^"]*"/)) next
      target = substr(text, RSTART + 1, RLENGTH - 2)
      from = layer_of(file); to = layer_of(target)
      if (to == "") { bad("\"" target "\": include from the root, as \"kernels/ops.h\""); next }
      if (rank[to] > rank[from])
        bad("\"" target "\": " from " may not include " to ", which lies right of it")
      if (target == "kernels/backend.h" && from != "kernels")
        bad("\"" target "\": private to kernels/, use kernels/ops.h")
    }
    END { exit found }'
}

check() {
  root=$1
  { (cd "$root" && find $layers -type f 2>/dev/null |
    grep -E '\.(c|h|cpp|cu|cuh)$' | sort -u |
    xargs grep -nE '^[ \t]*#[ \t]*(include[ \t]*"|if.*MOE_WITH_CUDA|elif.*MOE_WITH_CUDA)' /dev/null) ||
    true; } | judge
}

# plant NAME FILE TEXT: a clean tree plus this line must be refused, and the line named.
plant() {
  mkdir -p "$tree/$(dirname "$2")"
  printf '/* one */\n%s\n' "$3" >"$tree/$2"
  if check "$tree" >"$tree/out"; then
    echo "layers.sh: not found: $1" >&2
    exit 1
  fi
  if ! grep -q "^$2:2: " "$tree/out"; then
    echo "layers.sh: $1: expected $2:2, got:" >&2
    cat "$tree/out" >&2
    exit 1
  fi
  rm "$tree/$2"
}

self_test() {
  tree=$(mktemp -d)
  trap 'rm -rf "$tree"' EXIT
  for layer in $layers; do mkdir -p "$tree/$layer"; done
  mkdir -p "$tree/kernels/cpu"
  echo '#include "core/base/status.h"' >"$tree/core/base/status.c"
  echo '#include "kernels/backend.h"' >"$tree/kernels/cpu/gemm.c"
  echo '#ifdef MOE_WITH_CUDA' >"$tree/kernels/device.c"
  echo '#if defined(MOE_WITH_CUDA)' >"$tree/parallel/comm.c"
  printf '#include <stdio.h>\n#include "core/train/trainer.h"\n' >"$tree/launch/moe_train.c"
  if ! check "$tree" >"$tree/out"; then
    echo "layers.sh: a clean tree was refused:" >&2
    cat "$tree/out" >&2
    exit 1
  fi
  plant 'include to the right' core/base/bad.c '#include "kernels/ops.h"'
  plant 'to a right layer in core' data/bad.c '#include "core/model/params.h"'
  plant 'from a header' core/model/bad.h '#include "checkpoint/checkpoint.h"'
  plant 'from a subfolder' kernels/cpu/bad.c '#include "parallel/comm.h"'
  plant 'from CUDA' kernels/cuda/bad.cu '#  include "data/loader.h"'
  plant 'between core and train' checkpoint/bad.c '#include "core/train/trainer.h"'
  plant 'a path not from the root' kernels/bad.c '#include "ops.h"'
  plant 'the private header' core/model/bad.c '#include "kernels/backend.h"'
  plant 'ifdef outside device.c' core/train/bad.c '#ifdef MOE_WITH_CUDA'
  plant 'if defined' kernels/cpu/bad.c '#if defined(__linux__) && defined(MOE_WITH_CUDA)'
  plant 'ifndef' launch/bad.c '# ifndef MOE_WITH_CUDA'
  echo "layers.sh: finds all 11 planted violations"
}

case "${1-}" in
--self-test) self_test ;;
*) check "${1:-$(dirname "$0")/..}" ;;
esac
