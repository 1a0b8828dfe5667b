/* Messages for people: stderr, one line each, prefixed with the program and, off rank 0, the rank.
 */
#ifndef MOE_CORE_BASE_LOG_H
#define MOE_CORE_BASE_LOG_H

#include "core/base/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Say once at the start who is speaking. rank < 0: a program without ranks. */
void moe_log_init(const char *program, int rank);
const char *moe_log_program(void);

/* moe_info prints on rank 0 only; moe_warn and moe_error on every rank. */
void moe_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void moe_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
void moe_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* moe_error for a process that hangs: past stdio, whose lock the hanging thread may hold, and not
 * at all when stderr takes nothing for a second. */
void moe_error_now(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Print the thread's error message as `program: message` (with the trail when MOE_TRACE is set in
 * the environment) and return the exit code of `status`. */
int moe_report(moe_status status);

/* Human-readable sizes and times into a caller's buffer: "1.23 GiB", "2h 03m". Return buffer. */
enum { MOE_TEXT = 32 };
const char *moe_text_bytes(char text[MOE_TEXT], double bytes);
const char *moe_text_count(char text[MOE_TEXT], double count); /* 6.88 B, 28.1 M */
const char *moe_text_seconds(char text[MOE_TEXT], double seconds);

/* Monotonic seconds. */
double moe_clock_s(void);

#ifdef __cplusplus
}
#endif
#endif
