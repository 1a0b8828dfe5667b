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
