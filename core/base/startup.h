/* Startup: where the time before the first step goes, for the line that says so.
 *
 * The parts of a program's start say what they have just done; what they name alike adds up. One
 * thread. Texts must live until they are told. */
#ifndef MOE_CORE_BASE_STARTUP_H
#define MOE_CORE_BASE_STARTUP_H

#ifdef __cplusplus
extern "C" {
#endif

/* The program starts. */
void moe_startup_begin(void);
/* The time since the last of these calls went into `what`. */
void moe_startup_done(const char *what);
/* moe_info on rank 0: "ready after 14.2 s: device 1.1, plan 0.4, ...". Parts below a twentieth of
 * a second are left out. Later calls of moe_startup_done begin anew. */
void moe_startup_tell(void);

#ifdef __cplusplus
}
#endif
#endif
