/* A world of one rank, a temporary run folder, and saving the sample into it. */
#ifndef MOE_TESTS_CHECKPOINT_FIXTURE_H
#define MOE_TESTS_CHECKPOINT_FIXTURE_H

#include <criterion/criterion.h>

#include "core/base/log.h"
#include "tests/checkpoint/sample.h"
#include "tests/support/run_command.h"

static moe_comm *world;
static moe_device *dev;
static char run[64];
static char step_path[MOE_PATH];

/* In memory where there is such a file system: thousands of fsyncs are not what is tested. */
static inline void make_run_folder(void) {
  strcpy(run, "/dev/shm/moe-checkpoint-XXXXXX");
  if (mkdtemp(run)) return;
  strcpy(run, "/tmp/moe-checkpoint-XXXXXX");
  cr_assert(mkdtemp(run));
}

/* Suites use them as .init and .fini. */
static inline void open_world(void) {
  moe_device_options options = {.kind = MOE_DEVICE_CPU, .threads = 1};
  moe_log_init("test", 0);
  cr_assert(moe_comm_init(NULL, NULL) == MOE_OK && moe_device_open(&options, &dev) == MOE_OK &&
                moe_comm_world(dev, &world) == MOE_OK,
            "%s", moe_error_message());
  make_run_folder();
}

static inline void close_world(void) {
  moe_command c = moe_command_run(20, "rm -rf %s", run);
  moe_command_free(&c);
  moe_comm_destroy(world);
  moe_device_close(dev);
  moe_comm_finalize();
}

#define EXPECT_OK(call) cr_assert((call) == MOE_OK, "%s", moe_error_message())
#define EXPECT_SAYS(text)                                                                   \
  cr_assert(strstr(moe_error_message(), text), "\"%s\" is not in the message \"%s\"", text, \
            moe_error_message())

static inline moe_status save_sample(int64_t step, int keep) {
  moe_piece pieces[SAMPLE_PIECES];
  moe_run_state state = sample_state(step);
  sample_make(pieces, 0, 1, step);
  moe_status status =
      moe_checkpoint_save(world, dev, run, &state, pieces, SAMPLE_PIECES, keep, NULL, NULL);
  sample_free(pieces, SAMPLE_PIECES);
  return status;
}

/* Path of a step's folder, or of a file in it. Valid until the next call. */
static inline const char *in_step(int64_t step, const char *file) {
  snprintf(step_path, sizeof step_path, "%s/checkpoints/step-%08lld%s%s", run, (long long)step,
           file[0] ? "/" : "", file);
  return step_path;
}

/* Load everything of a step and compare. */
static inline moe_status load_sample(int64_t step, const char *path) {
  moe_piece pieces[SAMPLE_PIECES];
  sample_make(pieces, 0, 1, step);
  for (int i = 0; i < SAMPLE_PIECES; i++)
    memset(pieces[i].data, 0, (size_t)(pieces[i].count * moe_dtype_size(pieces[i].dtype)));
  moe_status status = moe_checkpoint_load(world, dev, path, pieces, SAMPLE_PIECES, true);
  for (int i = 0; i < SAMPLE_PIECES && status == MOE_OK; i++)
    if (!sample_is_right(&pieces[i], i % SAMPLE_TENSORS, step))
      status = moe_fail(MOE_FAILED, "%s: other bits than were saved", pieces[i].name);
  sample_free(pieces, SAMPLE_PIECES);
  return status;
}

/* The step that auto-resume takes; 0 for none, -1 for an error. */
static inline int64_t resumed_step(void) {
  char path[MOE_PATH];
  moe_run_state state;
  if (moe_checkpoint_find(world, run, "auto", path) != MOE_OK) return -1;
  if (!path[0]) return 0;
  EXPECT_OK(moe_checkpoint_read_state(world, path, &state));
  int64_t step = state.step;
  moe_run_state_clear(&state);
  return step;
}

/* Shell. */
#define SHELL(...)                                                                    \
  do {                                                                                \
    moe_command shell_ = moe_command_run(20, __VA_ARGS__);                            \
    cr_assert(shell_.exit_code == 0, "exit %d: %s", shell_.exit_code, shell_.output); \
    moe_command_free(&shell_);                                                        \
  } while (0)

#endif
