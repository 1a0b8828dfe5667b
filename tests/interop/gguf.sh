#!/bin/sh
# Does llama.cpp see in our GGUF files the models that are in the checkpoints? Exit 77 (skipped) where
# it is not installed.
#
#   tests/interop/gguf.sh
#
# The build folder is $MOE_BUILD, or build; the Python with the packages $MOE_PYTHON, or python3:
# python3 -m venv V && V/bin/pip install gguf xllamacpp h5py, then MOE_PYTHON=V/bin/python.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${MOE_PYTHON:-python3}
if ! "$python" -c 'import gguf, h5py, xllamacpp' 2>/dev/null; then
  echo "gguf.sh: skipped: $python has no gguf, h5py and xllamacpp (see the head of this script)"
  exit 77
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PYTHONDONTWRITEBYTECODE=1
PATH=$(cd "${MOE_BUILD:-$here/../../build}/bin" && pwd):$PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

cat "$here"/../../docs/*.md "$here"/../../data/*.c >text.txt
# characters that the tokenizers below have no piece for would become <unk> in a unigram file
LC_ALL=C tr -cd '\n\t -~' <text.txt >ascii.txt
printf '  two  spaces\n\t tab 12345 0x7f\n trailing \n\nwith `marks` <a> {b} [c] \\d\n' >varied.txt
head -c 12000 ascii.txt >>varied.txt
for type in unigram bpe; do
  moe-data train-tokenizer --input ascii.txt --vocab-size 600 --model-type $type --output $type 2>/dev/null
done

# A checkpoint: NAME DTYPE SETTING...
train() {
  name=$1 dtype=$2
  shift 2
  set -- model.preset=tiny model.vocab_size=611 model.num_layers=3 model.context=64 "$@"
  moe-data tokenize --input ascii.txt --tokenizer bpe.model --output tokens --overwrite 2>/dev/null
  printf '[data]\ntrain = tokens\nvalid_fraction = 0\n[run]\ndir = %s\n[optim]\nlr = 3e-3\nwarmup_steps = 2\n' \
    "$name" >"$name.ini"
  options=
  for setting in "$@" train.steps=30 train.micro_batch=4 precision.dtype="$dtype" log.tensorboard=false; do
    options="$options --set $setting"
  done
  # shellcheck disable=SC2086 # one word each
  moe-train "$name.ini" $options >"$name.log" 2>&1 || { tail -n 5 "$name.log" && exit 1; }
}

# Export and look: NAME EXPORT-OPTION...
check() {
  name=$1
  shift
  echo "== $name $*"
  tokenizer=
  options=
  for word in "$@"; do
    case $word in
    *.model | bytes) tokenizer=$word ;;
    esac
    options="$options $word"
  done
  # shellcheck disable=SC2086
  moe-convert export-gguf "$name" --output "$name.gguf" --overwrite $options 2>export.log ||
    { cat export.log && exit 1; }
  if [ -n "$tokenizer" ]; then
    "$python" "$here/gguf_llama.py" "$name"/checkpoints/step-* "$name.gguf" varied.txt "$(command -v moe-data)" "$tokenizer"
  else
    "$python" "$here/gguf_llama.py" "$name"/checkpoints/step-* "$name.gguf"
  fi
}

odd="model.hidden_size=48 model.num_heads=4 model.num_kv_heads=2 model.head_dim=10 model.num_experts=5 model.top_k=2 model.ffn_size=36"
# shellcheck disable=SC2086
train odd fp32 $odd
train even bf16 model.hidden_size=64 model.num_heads=6 model.num_kv_heads=1 model.head_dim=8 model.num_experts=6 \
  model.top_k=3 model.ffn_size=96
check odd --dtype fp32 --tokenizer bpe.model
check odd --dtype fp16 --tokenizer unigram.model
check odd --dtype fp32 --alpha 8 --tokenizer bytes
check even --dtype bf16 --tokenizer bytes
check even --dtype q8_0 --tokenizer bytes
echo "gguf.sh: all agree"
