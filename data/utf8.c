/* UTF-8 by hand: the C library's decoders depend on the locale. */
#include "data/utf8.h"

#include <string.h>

/* Bytes of the character at `text`, 0 when it is malformed or does not end within `length`. */
static int64_t character(const unsigned char *text, int64_t length) {
  unsigned char first = text[0];
  if (first < 0x80) return first != 0;
  int64_t size = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || size > length) return 0;
  for (int64_t i = 1; i < size; i++)
    if ((text[i] & 0xC0) != 0x80) return 0;
  /* the second byte tells overlong forms, surrogates and too large numbers */
  if (first == 0xE0 && text[1] < 0xA0) return 0;
  if (first == 0xED && text[1] > 0x9F) return 0;
  if (first == 0xF0 && text[1] < 0x90) return 0;
  if (first == 0xF4 && text[1] > 0x8F) return 0;
  return size;
}

/* Eight bytes, all ASCII and none NUL? A zero byte borrows from bit 7 of itself; as all bytes are
 * below 0x80 no borrow is mistaken. */
static int plain_ascii(const unsigned char *text) {
  const uint64_t ones = 0x0101010101010101u, high = 0x8080808080808080u;
  uint64_t word;
  memcpy(&word, text, sizeof word);
  return (word & high) == 0 && ((word - ones) & high) == 0;
}

int64_t moe_utf8_valid(const char *text, int64_t length) {
  const unsigned char *at = (const unsigned char *)text;
  for (int64_t i = 0; i < length;) {
    if (length - i >= 8 && plain_ascii(at + i)) {
      i += 8;
      continue;
    }
    int64_t size = character(at + i, length - i);
    if (size == 0) return i;
    i += size;
  }
  return length;
}

int64_t moe_utf8_cut(const char *text, int64_t length, int64_t limit) {
  if (length <= limit) return length;
  const char *second_half = text + limit / 2;
  size_t half = (size_t)(limit - limit / 2);
  const char *at = memrchr(second_half, '\n', half);
  if (!at) at = memrchr(second_half, ' ', half);
  if (at && at > text) return at - text;
  int64_t cut = limit;
  while (cut > limit - 4 && ((unsigned char)text[cut] & 0xC0) == 0x80) cut--;
  return cut > limit - 4 ? cut : limit; /* malformed: anywhere */
}
