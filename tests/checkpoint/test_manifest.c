/* Hostile manifests: each has a correct hash of its own, so only the checks stand in the way. */
#include "checkpoint/files.h"
#include "checkpoint/verify.h"
#include "tests/checkpoint/fixture.h"

TestSuite(manifest, .init = open_world, .fini = close_world);

static char *text;
static int64_t length;

/* The manifest of a good checkpoint (step 1), without its last member. */
static void read_good(void) {
  EXPECT_OK(save_sample(1, 2));
  EXPECT_OK(moe_files_read(in_step(1, "manifest.json"), MOE_MANIFEST_LIMIT, &text, &length));
  char *tail = strstr(text, "  \"manifest_xxh3_128\"");
  cr_assert(tail);
  *tail = 0;
}

/* Close `body` with its hash and parse it. */
static moe_status parse(const char *body, moe_manifest *out) {
  char hash[MOE_HASH_TEXT], *sealed = malloc(strlen(body) + 128);
  moe_hash_text(XXH3_128bits(body, strlen(body)), hash);
  sprintf(sealed, "%s  \"manifest_xxh3_128\": \"%s\"\n}\n", body, hash);
  moe_status status = moe_manifest_parse(sealed, (int64_t)strlen(sealed), "hostile", out);
  free(sealed);
  return status;
}

/* `text` with the first `from` after `after` replaced; malloc'd. */
static char *edit(const char *after, const char *from, const char *to) {
  char *start = strstr(text, after), *at = start ? strstr(start, from) : NULL;
  cr_assert(at, "'%s' after '%s' is not in the manifest", from, after);
  char *out = malloc(strlen(text) + strlen(to) + 1);
  sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
  return out;
}

#define LAST_EXPERT "experts.2.w1.weight"
static const struct {
  const char *after, *from, *to, *says;
} hostile[] = {
    {"", "\"1.0\"", "\"2.0\"", "\"schema\" is not one this program reads"},
    {"", "\"1.0\"", "\"1.0.1\"", "\"schema\""},
    {"", "\"1.0\"", "1.0", "\"schema\" is not a string"},
    {"", "moe-train checkpoint", "moe-train", "\"format\""},
    {"", "\"ranks\": 1", "\"ranks\": -1", "\"ranks\""},
    {"", "\"state\"", "\"statf\"", "is missing"},
    {"\"state\"", "\"step\":\"1\"", "\"step\":1", "\"step\" is not a string"},
    {"\"state\"", "\"step\":\"1\"", "\"step\":\"-1\"", "\"step\""},
    {"\"state\"", "\"step\":\"1\"", "\"step\":\"9223372036854775808\"", "beyond 2^63"},
    {"\"state\"", "\"step\":\"1\"", "\"step\":\"99999999999999999999\"", "\"step\""},
    {"\"state\"", "\"65536\"", "\"inf\"", "\"loss_scale\" is not a finite number"},
    {"\"state\"", "\"router_bias\":[]", "\"router_bias\":[\"nan\"]", "\"router_bias\""},
    {"\"state\"", "\"router_bias\":[]", "\"router_bias\":[\"1e39\"]", "\"router_bias\""},
    {"\"state\"", "\"router_bias\":[]", "\"router_bias\":[1]", "\"router_bias\""},
    {"\"state\"", "\"router_bias\":[]", "\"router_bias\":{}", "\"router_bias\" is not a list"},
    {"\"files\"", "shard-0", "../shard-0", "not a plain file name"},
    {"\"files\"", "shard-0", "/etc/shard-0", "not a plain file name"},
    {"\"files\"", "shard-0", ".shard-0", "not a plain file name"},
    {"\"files\"", "shard-0", "sh\\nrd-0", "not a plain file name"},
    {"\"files\"", "\"size\":\"", "\"size\":\"999999999999999", "\"size\""},
    {"\"files\"", "\"size\":\"", "\"size\":\"-", "\"size\""},
    {"\"tensors\"", "\"rows\":\"37\"", "\"rows\":\"38\"", "\"dataset\""},
    {"\"tensors\"", "\"count\":\"592\"", "\"count\":\"0\"", "\"dataset\""},
    {"\"tensors\"", "\"count\":\"592\"", "\"count\":\"9223372036854775807\"", "\"dataset\""},
    {"\"tensors\"", "\"begin\":\"0\"", "\"begin\":\"9223372036854775807\"", "outside the tensor"},
    {"\"tensors\"", "\"begin\":\"0\"", "\"begin\":\"1\"", "outside the tensor"},
    {"\"tensors\"", "\"file\":0", "\"file\":1", "file number"},
    {"\"tensors\"", "\"file\":0", "\"file\":-1", "\"file\""},
    {"\"tensors\"", "\"file\":0", "\"file\":0.5", "\"file\""},
    {"\"tensors\"", "\"file\":0", "\"file\":1e300", "\"file\""},
    {"\"tensors\"", "\"offset\":\"", "\"offset\":\"9", "beyond the end"},
    {"\"tensors\"", "\"dtype\":\"bf16\"", "\"dtype\":\"bf17\"", "\"dtype\" is not known"},
    {"\"tensors\"", "\"role\":\"param\"", "\"role\":\"parma\"", "\"role\" is not known"},
    {"\"tensors\"", "\"role\":\"param\"", "\"role\":\"master\"", "\"dataset\""},
    {"\"tensors\"", "\"dataset\":\"/param", "\"dataset\":\"/other", "\"dataset\""},
    {"\"tensors\"", "\"xxh3_128\":\"", "\"xxh3_128\":\"0", "32-digit hash"},
    {"\"tensors\"", LAST_EXPERT, "experts.1.w1.weight", "\"dataset\""},
    {"", "\n    {\"role\":\"param\"", "\n    3,{\"role\":\"param\"", "is missing"},
    {"", "\"files\": [", "\"files\": [], \"fils\": [", "lists no files"},
    {"", "\"tensors\": [", "\"tensors\": 1, \"t\": [", "\"tensors\" is not a list"},
};

Test(manifest, each_hostile_one_is_refused_with_its_reason) {
  read_good();
  moe_manifest m;
  EXPECT_OK(parse(text, &m)); /* the method works */
  moe_manifest_clear(&m);
  for (size_t i = 0; i < sizeof hostile / sizeof hostile[0]; i++) {
    char *body = edit(hostile[i].after, hostile[i].from, hostile[i].to);
    moe_status status = parse(body, &m);
    cr_expect(status == MOE_DAMAGED && strstr(moe_error_message(), hostile[i].says),
              "%s -> %s: status %d, \"%s\"", hostile[i].from, hostile[i].to, (int)status,
              moe_error_message());
    cr_expect(m.slice == NULL && m.file == NULL, "nothing is handed out");
    free(body);
  }
}

/* Cut out the line of the first slice whose line holds `what`; returns it, malloc'd. */
static char *cut_line(char *body, const char *what) {
  char *at = strstr(strstr(body, "\"tensors\""), what), *start = at, *end = strchr(at, '\n');
  while (*start != '\n') start--;
  char *line = strndup(start, (size_t)(end - start));
  memmove(start, end, strlen(end) + 1);
  return line;
}

Test(manifest, every_tensor_is_there_exactly_once) {
  enum { PARTS = 3 };
  moe_manifest m = {.ranks = 1, .files = 1};
  m.file = calloc(1, sizeof *m.file);
  strcpy(m.file->name, "a.h5");
  m.file->size = 1000;
  for (int missing = 0; missing < PARTS; missing++) {
    m.slice = calloc(PARTS, sizeof *m.slice);
    for (int i = 0; i < PARTS; i++) {
      if (i == missing) continue;
      m.slice[m.slices++] = (moe_slice){.name = "t",
                                        .dims = 1,
                                        .shape = {30, 1},
                                        .begin = 10 * i,
                                        .count = 10,
                                        .offset = 1 + 40 * i};
    }
    cr_expect(moe_manifest_check(&m, "m") == MOE_DAMAGED);
    EXPECT_SAYS("of 30 is missing");
    free(m.slice);
    m.slices = 0;
  }
  m.slice = NULL;
  moe_manifest_clear(&m);

  read_good(); /* a whole tensor listed twice, in two places */
  char *body = malloc(2 * strlen(text));
  strcpy(body, text);
  char *line = cut_line(body, LAST_EXPERT);
  char *list = strstr(body, "\"tensors\": [") + strlen("\"tensors\": [");
  size_t n = strlen(line);
  memmove(list + 2 * n, list, strlen(list) + 1);
  memcpy(list, line, n);
  memcpy(list + n, line, n);
  cr_expect(parse(body, &m) == MOE_DAMAGED);
  EXPECT_SAYS("experts.2.w1.weight: element 0 is there twice");
  free(line);
  free(body);
}

/* A file of 1000 bytes and one slice, good but for what the row says. */
#define SLICE .name = "t", .dims = 2, .shape = {4, 5}, .count = 20, .offset = 100
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverride-init"
static const struct {
  moe_slice slice;
  const char *says;
} impossible[] = {
    {{SLICE, .name = ""}, "unusable characters"},
    {{SLICE, .name = "."}, "unusable characters"},
    {{SLICE, .name = "../t"}, "unusable characters"},
    {{SLICE, .name = "t@3"}, "unusable characters"},
    {{SLICE, .name = "a\033[2J"}, "unusable characters"},
    {{SLICE, .dims = 0}, "impossible shape"},
    {{SLICE, .dims = 3}, "impossible shape"},
    {{SLICE, .shape = {0, 5}}, "impossible shape"},
    {{SLICE, .shape = {-4, -5}}, "impossible shape"},
    {{SLICE, .shape = {INT64_MAX, 2}}, "impossible shape"},
    {{SLICE, .shape = {1LL << 61, 1}}, "impossible shape"},
    {{SLICE, .count = 0}, "outside the tensor"},
    {{SLICE, .count = -1}, "outside the tensor"},
    {{SLICE, .count = 21}, "outside the tensor"},
    {{SLICE, .begin = -1}, "outside the tensor"},
    {{SLICE, .begin = 1}, "outside the tensor"},
    {{SLICE, .begin = INT64_MAX}, "outside the tensor"},
    {{SLICE, .file = 1}, "file number"},
    {{SLICE, .file = -1}, "file number"},
    {{SLICE, .offset = 0}, "beyond the end"},
    {{SLICE, .offset = 921}, "beyond the end"},
    {{SLICE, .offset = INT64_MAX}, "beyond the end"},
    {{SLICE, .shape = {1LL << 60, 1}, .count = 1LL << 60}, "beyond the end"},
    {{SLICE, .count = 19}, "element 19 of 20 is missing"},
};
#pragma GCC diagnostic pop

Test(manifest, impossible_numbers_are_refused) {
  for (size_t i = 0; i < sizeof impossible / sizeof impossible[0]; i++) {
    moe_manifest m = {.ranks = 1, .files = 1, .slices = 1};
    m.file = calloc(1, sizeof *m.file);
    m.slice = calloc(1, sizeof *m.slice);
    *m.file = (moe_shard_file){.name = "a.h5", .size = 1000};
    *m.slice = impossible[i].slice;
    cr_expect(moe_manifest_check(&m, "m") == MOE_DAMAGED, "row %zu", i);
    EXPECT_SAYS(impossible[i].says);
    moe_manifest_clear(&m);
  }
}

Test(manifest, two_slices_must_not_share_bytes) {
  moe_manifest m = {.ranks = 1, .files = 1, .slices = 2};
  m.file = calloc(1, sizeof *m.file);
  strcpy(m.file->name, "a.h5");
  m.file->size = 1000;
  m.slice = calloc(2, sizeof *m.slice);
  for (int i = 0; i < 2; i++)
    m.slice[i] = (moe_slice){.name = "t",
                             .dims = 1,
                             .shape = {20, 1},
                             .begin = 10 * i,
                             .count = 10,
                             .offset = 8 + 39 * i};
  cr_expect(moe_manifest_check(&m, "m") == MOE_DAMAGED);
  EXPECT_SAYS("share bytes of a.h5");
  m.slice[1].offset = 48;
  EXPECT_OK(moe_manifest_check(&m, "m"));
  moe_manifest_clear(&m);
}

Test(manifest, deep_nesting_and_broken_json_are_refused) {
  read_good();
  enum { DEEP = 500000 };
  char *nest = malloc(DEEP + 20);
  strcpy(nest, "\"router_bias\":");
  memset(nest + 14, '[', DEEP);
  nest[14 + DEEP] = 0;
  char *body = edit("", "\"router_bias\":[]", nest);
  moe_manifest m;
  cr_expect(parse(body, &m) == MOE_DAMAGED);
  EXPECT_SAYS("not a JSON object");
  cr_expect(parse("[", &m) == MOE_DAMAGED);
  cr_expect(parse("", &m) == MOE_DAMAGED);
  cr_expect(moe_manifest_parse("", 0, "empty", &m) == MOE_DAMAGED);
  cr_expect(moe_manifest_parse("{}", 2, "short", &m) == MOE_DAMAGED);
  free(body);
  free(nest);
}

Test(manifest, a_higher_minor_version_with_more_members_is_read) {
  read_good();
  char *body = edit("", "\"1.0\"", "\"1.7\", \"new\": {\"a\": [1, 2]}");
  moe_manifest m;
  EXPECT_OK(parse(body, &m));
  moe_manifest_clear(&m);
  free(body);
}

Test(manifest, an_enormous_file_is_refused_before_it_is_read) {
  EXPECT_OK(save_sample(1, 2));
  moe_manifest m;
  SHELL("truncate -s 1T %s || truncate -s 1G %s", in_step(1, "manifest.json"),
        in_step(1, "manifest.json"));
  cr_expect(moe_manifest_read(in_step(1, ""), &m) == MOE_DAMAGED);
  EXPECT_SAYS("more than the");
}

/* A stored configuration that is refused, in these words. */
static void refuse_config(moe_manifest *m, const char *config, const char *says) {
  free(m->state.config);
  m->state.config = strdup(config);
  cr_expect(moe_checkpoint_check_model(m, "hostile") == MOE_DAMAGED);
  EXPECT_SAYS(says);
}

/* A configuration text that promises 50 million tensors must not make us list them. */
Test(manifest, a_model_larger_than_the_checkpoint_is_refused_at_once) {
  moe_manifest m;
  EXPECT_OK(save_sample(1, 2));
  EXPECT_OK(moe_manifest_read(in_step(1, ""), &m));
  refuse_config(&m, "[model]\npreset = tiny\nnum_layers = 4096\nnum_experts = 4096\n",
                "fewer than its model");
  refuse_config(&m, "[model]\nno_such_key = 1\n", "hostile: was written by a newer version");
  EXPECT_SAYS("no_such_key");
  refuse_config(&m, "[model]\npreset = tiny\n[no_such_section]\n", "newer version");
  refuse_config(&m, "[model]\npreset = tiny\nnum_layers = -3\n",
                "hostile: its configuration is not valid");
  EXPECT_SAYS("num_layers");
  moe_manifest_clear(&m);
}
