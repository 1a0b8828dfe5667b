# shellcheck shell=bash # sourced by run.sh
# Faults of what a person or another program gives us: configurations and token files.

# Lines appended to a good configuration, each of which makes it bad, and what the message must name.
bad_lines=(
  '[train]|stepz = 4|stepz' '[train]|steps = many|steps' '[train]|steps = -1|steps'
  '[train]|steps = 1e9999|steps' '[train]|steps =|steps' '[train]|steps = 4 5|steps'
  '[train]|global_batch = 7|global_batch' '[train]|micro_batch = 0|micro_batch'
  '[train]|recompute = all|recompute' '[train]|recompute_layers = 5000|recompute_layers'
  '[train]|aux_coef = nan|aux_coef' '[train]|z_coef = -1|z_coef' '[train]|nonfinite_limit = 0|nonfinite_limit'
  '[train]|eval_batches = 0|eval_batches' '[trian]|steps = 4|trian' '[model]|preset = huge|preset'
  '[model]|top_k = 9|top_k' '[model]|head_dim = 7|head_dim' '[model]|num_heads = 3|num_heads'
  '[model]|num_experts = 99999|num_experts' '[model]|vocab_size = -5|vocab_size'
  '[model]|context = 8|sequence_length' '[model]|norm_eps = 1|norm_eps' '[model]|rope_alpha = 0|rope_alpha'
  '[data]|sequence_length = 17|sequence_length' '[data]|prefetch = 0|prefetch'
  '[data]|valid_fraction = 2|valid_fraction' '[optim]|lr = fast|lr' '[optim]|lr = -1|lr'
  '[optim]|beta1 = 1|beta1' '[optim]|beta2 = 1.5|beta2' '[optim]|eps = 0|eps'
  '[optim]|schedule = step|schedule' '[parallel]|ep = 3|ep' '[parallel]|ep = -1|ep'
  '[parallel]|exchange = mail|exchange' '[precision]|dtype = fp8|dtype' '[checkpoint]|keep = 1|keep'
  '[checkpoint]|interval = -2|interval' '[run]|backend = tpu|backend' '[run]|memory_gib = lots|memory_gib'
)

bad_configuration() {
  local section line key code
  IFS='|' read -r section line key <<<"${bad_lines[($1 - 1) % ${#bad_lines[@]}]}"
  make_config cfg.ini
  # In the place of the good value, since a key given twice is an error of its own.
  sed -i "/^${line%% *} *=/d" cfg.ini
  printf '%s\n%s\n' "$section" "$line" >>cfg.ini
  train 2 cfg.ini
  code=$?
  [ "$code" = 2 ] || violation "$section $line: exit code $code: $(tail -n 2 log)"
  says "$key"
  says cfg.ini
  [ "$(grep -c '^moe-train: ' log)" = 1 ] || violation "not one line of cause: $(cat log)"
  [ ! -e run ] || violation "a run folder was made"
}
fault "bad configuration" 4 "${#bad_lines[@]}" bad_configuration \
  "named with file and line, exit 2, nothing made"

# Token files: cut, grown, or with a flipped byte in the index; ids the model has no row for.
damaged_tokens() {
  local train code at size
  train=$(corpus) || exit 1
  cp "$train.bin" t.bin && cp "$train.idx" t.idx
  make_config cfg.ini
  sed -i "s|^train = .*|train = t|" cfg.ini
  RANDOM=$1
  case $(($1 % 5)) in
  0) truncate -s "-$((1 + RANDOM))" t.bin ;;
  1) truncate -s "-$((1 + RANDOM % 3000))" t.idx ;;
  2) # a number of the index: lengths, places, documents
    size=$(stat -c %s t.idx) at=$((34 + RANDOM % (size - 34)))
    printf '\xa5' | dd of=t.idx bs=1 seek=$at conv=notrunc status=none ;;
  3) # its head: the magic, the version, the type, the counts
    printf '\xa5' | dd of=t.idx bs=1 seek=$((RANDOM % 34)) conv=notrunc status=none ;;
  4) # every token of a stretch is beyond the vocabulary
    head -c 100000 /dev/zero | tr '\0' '\377' | dd of=t.bin bs=1k seek=$((RANDOM % 50)) conv=notrunc status=none ;;
  esac
  train 2 cfg.ini
  code=$?
  [ $code = 3 ] || violation "case $(($1 % 5)): exit code $code: $(grep moe-train: log | tail -n 2)"
  grep '^moe-train: .*[0-9]' log | grep -q 't\.\(idx\|bin\)' || violation "not named: $(grep moe-train: log)"
}
fault "damaged token file" 5 20 damaged_tokens "named with the place, exit 3"
