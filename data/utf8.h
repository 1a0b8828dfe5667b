/* UTF-8: checking it and cutting it. */
#ifndef MOE_DATA_UTF8_H
#define MOE_DATA_UTF8_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How many bytes at the beginning are well-formed UTF-8 (RFC 3629: no overlong forms, surrogates or
 * numbers above U+10FFFF) without NUL, which text does not contain but UTF-16 and binaries do. */
int64_t moe_utf8_valid(const char *text, int64_t length);

/* Where to cut a text so that the first part has at most `limit` >= 4 bytes: all of it when it
 * fits, else before the last newline of the second half, else before its last space, else between
 * characters. Never 0 for a text that is not empty. */
int64_t moe_utf8_cut(const char *text, int64_t length, int64_t limit);

#ifdef __cplusplus
}
#endif
#endif
