/* interop_logits PATH SEQUENCE <tokens >logits
 *
 * The logits of a checkpoint's step folder or a Hugging Face folder, by the forward pass that
 * proves exports: token ids as text on standard input, sequences of SEQUENCE tokens; f32 [T, V] as
 * bytes on standard output. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "checkpoint/hf.h"
#include "core/base/log.h"

enum { MOST = 4096 };

static moe_status open_weights(const char *path, moe_weights **out) {
  char config[MOE_PATH];
  struct stat st;
  snprintf(config, sizeof config, "%s/config.json", path);
  return stat(config, &st) == 0 ? moe_weights_open_hf(path, out)
                                : moe_weights_open_checkpoint(path, out);
}

static moe_status run(const char *path, int64_t seq) {
  static int32_t tokens[MOST];
  int64_t n = 0;
  moe_weights *w;
  while (n < MOST && scanf("%d", &tokens[n]) == 1) n++;
  MOE_TRY(open_weights(path, &w));
  float *logits = malloc((size_t)(n * w->dims.vocab) * sizeof *logits);
  const moe_weights_pass pass = {.weights = w, .logits = logits};
  moe_status status = moe_weights_logits(&pass, 1, tokens, n / seq, seq, NULL);
  if (status == MOE_OK) fwrite(logits, sizeof *logits, (size_t)(n * w->dims.vocab), stdout);
  free(logits);
  moe_weights_close(w);
  return status;
}

int main(int argc, char **argv) {
  moe_cpu_choose_blas(argv);
  moe_log_init("interop_logits", -1);
  if (argc != 3 || atoll(argv[2]) < 1) {
    fprintf(stderr, "usage: interop_logits PATH SEQUENCE <tokens >logits\n");
    return 2;
  }
  return moe_report(run(argv[1], atoll(argv[2])));
}
