/* Status codes and error messages.
 *
 * Every fallible function returns a moe_status. The code that finds the fault calls moe_fail, which
 * keeps one message per thread ("what is wrong: where: how to mend it"); callers pass it up through
 * MOE_TRY, which adds a trail for debugging. The program's main prints the message once and exits
 * with moe_status_exit_code. */
#ifndef MOE_CORE_BASE_STATUS_H
#define MOE_CORE_BASE_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

/* name, process exit code, meaning */
#define MOE_STATUS_MAP(X)                                   \
  X(OK, 0, "done")                                          \
  X(FAILED, 1, "failed")                                    \
  X(USAGE, 2, "bad usage or configuration")                 \
  X(DAMAGED, 3, "damaged or unsafe input file")             \
  X(DIVERGED, 4, "training diverged (non-finite)")          \
  X(INVALID, 1, "invalid argument to an internal function") \
  X(NO_MEMORY, 1, "out of memory")                          \
  X(IO, 1, "input or output failed")                        \
  X(STOPPED, 75, "stopped on request after saving")         \
  X(HUNG, 76, "a rank did not answer in time")

typedef enum {
#define X(name, code, text) MOE_##name,
  MOE_STATUS_MAP(X)
#undef X
} moe_status;

/* Record an error message for this thread and return `code`. printf-style; no trailing newline. */
moe_status moe_fail(moe_status code, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* The last message of this thread ("" when none), and the trail MOE_TRY collected. */
const char *moe_error_message(void);
const char *moe_error_trail(void);
void moe_error_clear(void);
/* Used by MOE_TRY. */
moe_status moe_error_pass(moe_status status, const char *file, int line, const char *function);
#ifdef __clang_analyzer__ /* which must know that both return the status they are given */
#define moe_fail(code, ...) ((void)(moe_fail)((code), __VA_ARGS__), (code))
#define moe_error_pass(status, ...) ((void)(moe_error_pass)((status), __VA_ARGS__), (status))
#endif

const char *moe_status_name(moe_status status);
int moe_status_exit_code(moe_status status);

/* Evaluate a call; on an error return its status from the current function. */
#define MOE_TRY(call)                                                       \
  do {                                                                      \
    moe_status moe_try_status_ = (call);                                    \
    if (moe_try_status_ != MOE_OK)                                          \
      return moe_error_pass(moe_try_status_, __FILE__, __LINE__, __func__); \
  } while (0)

/* The same for functions that release resources: sets `status` and jumps to `done`. */
#define MOE_TRY_OR(status, done, call)                        \
  do {                                                        \
    (status) = (call);                                        \
    if ((status) != MOE_OK) {                                 \
      moe_error_pass((status), __FILE__, __LINE__, __func__); \
      goto done;                                              \
    }                                                         \
  } while (0)

#ifdef __cplusplus
}
#endif
#endif
