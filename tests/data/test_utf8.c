#include "data/utf8.h"
#include "fixture.h"

static int64_t valid(const char *text) {
  return moe_utf8_valid(text, (int64_t)strlen(text));
}

Test(utf8, accepts_the_first_and_last_character_of_each_length) {
  static const char *const good[] = {"",
                                     "plain text, longer than eight bytes",
                                     "\x01\x7F",
                                     "\xC2\x80\xDF\xBF",
                                     "\xE0\xA0\x80\xED\x9F\xBF\xEE\x80\x80\xEF\xBF\xBF",
                                     "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF"};
  for (size_t i = 0; i < sizeof good / sizeof good[0]; i++)
    cr_assert_eq(valid(good[i]), strlen(good[i]), "%zu", i);
}

Test(utf8, finds_the_first_bad_byte) {
  static const char *const bad[] = {
      "\x80",             /* continuation alone */
      "\xC0\xAF",         /* overlong */
      "\xC1\xBF",         /* overlong */
      "\xE0\x9F\xBF",     /* overlong */
      "\xF0\x8F\xBF\xBF", /* overlong */
      "\xED\xA0\x80",     /* surrogate */
      "\xF4\x90\x80\x80", /* above U+10FFFF */
      "\xF5\x80\x80\x80",
      "\xFE",
      "\xFF",
      "\xC3",     /* cut short */
      "\xE2\x82", /* cut short */
      "\xC3(",
  };
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    char text[64];
    snprintf(text, sizeof text, "eleven b\xC3\xA9 %s", bad[i]);
    cr_assert_eq(valid(text), 11, "%zu", i);
  }
  cr_assert_eq(moe_utf8_valid("eight...\0nine", 13), 8, "NUL is no text");
  cr_assert_eq(moe_utf8_valid("a\0nine...........", 16), 1, "NUL within the fast path");
}

/* 2^21 combinations of a lead and two more bytes, against the definition by code point. */
Test(utf8, agrees_with_the_definition_for_every_three_bytes) {
  for (unsigned lead = 0xC0; lead < 0xF0; lead++)
    for (unsigned second = 0; second < 256; second++) {
      const char text[] = {(char)lead, (char)second, (char)0xBF};
      int64_t expected = 0;
      if ((second & 0xC0) == 0x80) {
        unsigned two = (lead & 0x1F) << 6 | (second & 0x3F);
        unsigned three = (lead & 0x0F) << 12 | (second & 0x3F) << 6 | 0x3F;
        if (lead < 0xE0 && two >= 0x80) expected = 2;
        if (lead >= 0xE0 && three >= 0x800 && (three < 0xD800 || three > 0xDFFF)) expected = 3;
      }
      cr_assert_eq(moe_utf8_valid(text, 3), expected, "%02X %02X", lead, second);
    }
}

Test(utf8, cuts_at_newlines_then_spaces_then_characters) {
  cr_assert_eq(moe_utf8_cut("short", 5, 8), 5);
  cr_assert_eq(moe_utf8_cut("aaaaa\nb cc", 10, 8), 5);
  cr_assert_eq(moe_utf8_cut("aaaaa b cc", 10, 8), 7);
  cr_assert_eq(moe_utf8_cut("aaaaaaaaaa", 10, 8), 8);
  cr_assert_eq(moe_utf8_cut("aaaaaaa\xE2\x82\xAC", 10, 8), 7);
  cr_assert_eq(moe_utf8_cut("\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", 10, 8), 8);
}
