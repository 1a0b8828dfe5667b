/* moe-data as its users see it: commands, files, messages, exit codes. */
#include "fixture.h"
#include "tests/support/run_command.h"

#define MOE_DATA MOE_BIN_DIR "/moe-data"

TestSuite(moe_data, .init = make_folder, .fini = remove_folder);

/* Run in the test's folder; the exit code and what must be in the output. */
static void run(int exit_code, const char *says, const char *command) {
  moe_command c = moe_command_run(60, "cd %s && %s", folder, command);
  cr_assert(!c.timed_out, "%s", command);
  cr_assert_eq(c.exit_code, exit_code, "%s\nexit code %d\n%s", command, c.exit_code, c.output);
  cr_assert(moe_command_says(&c, says), "%s\nlacks \"%s\":\n%s", command, says, c.output);
  moe_command_free(&c);
}

/* Ids of a byte-tokenized file, written as text, special tokens as ^ (bos) and $ (eos). */
static void holds(const char *prefix, const char *expected) {
  moe_token_file *f;
  ok(moe_token_file_open(in_folder(prefix), &f));
  int64_t count = moe_token_file_tokens(f);
  int32_t *ids = malloc((size_t)count * sizeof *ids);
  char *text = calloc((size_t)count + 1, 1);
  ok(moe_token_file_read(f, 0, count, 260, ids));
  for (int64_t i = 0; i < count; i++)
    text[i] = ids[i] >= 4 ? (char)(ids[i] - 4) : (char)"?!^$"[ids[i]];
  cr_assert_str_eq(text, expected);
  moe_token_file_close(f);
  free(ids);
  free(text);
}

Test(moe_data, helps) {
  run(0, "Usage: moe-data", MOE_DATA " --help");
  run(0, "--vocab-size", MOE_DATA " verify --help");
  run(0, "moe-data 0.", MOE_DATA " --version");
}

Test(moe_data, refuses_bad_usage_with_exit_code_2) {
  run(2, "no command", MOE_DATA);
  run(2, "unknown command: sing", MOE_DATA " sing");
  run(2, "unknown or incomplete option: --loud", MOE_DATA " inspect --loud x");
  run(2, "unknown or incomplete option: --output", MOE_DATA " tokenize --output");
  run(2, "--model-type is no option", MOE_DATA " inspect --model-type bpe x");
  run(2, "no input", MOE_DATA " tokenize --tokenizer bytes --output x");
  run(2, "no output", MOE_DATA " tokenize --tokenizer bytes a.txt");
  run(2, "no tokenizer", MOE_DATA " tokenize --output x a.txt");
  run(2, "no vocabulary", MOE_DATA " verify x");
  run(2, "--workers 0", MOE_DATA " tokenize --workers 0 --tokenizer bytes --output x a.txt");
  run(2, "--vocab-size 5x", MOE_DATA " verify --vocab-size 5x x");
  run(2, "--model-type word",
      MOE_DATA " train-tokenizer --model-type word --output x --input a.txt");
  run(2, "above 0", MOE_DATA " train-tokenizer --character-coverage 2 --output x --input a.txt");
}

Test(moe_data, tokenizes_documents_in_order) {
  write_file(in_folder("a.txt"), "one\n\ntwo\n", 9);
  const char *records = "{\"text\":\"three\"}\n{\"text\":\"\"}\n{\"text\":\"4\"}\n";
  write_file(in_folder("b.jsonl"), records, strlen(records));
  run(0, "3 documents", MOE_DATA " tokenize --input a.txt b.jsonl --tokenizer bytes --output ab");
  holds("ab", "one\n\ntwo\n$three$4$");
  run(0, "2 documents",
      MOE_DATA " tokenize a.txt --tokenizer bytes --output l --prepend-bos "
               "--no-append-eos --split-documents=blank-lines");
  holds("l", "^one^two");
  run(0, "2 documents",
      "cat a.txt | " MOE_DATA
      " tokenize --input - --tokenizer bytes --output s --split-documents lines");
  holds("s", "one$two$");
  run(0, "1 document", MOE_DATA " tokenize a.txt --tokenizer bytes --output new/folder/a");
  holds("new/folder/a", "one\n\ntwo\n$");
}

Test(moe_data, gives_the_same_file_with_any_number_of_workers) {
  FILE *file = fopen(in_folder("a.jsonl"), "w");
  for (int i = 0; i < 60000; i++)
    fprintf(file, "{\"text\":\"document %d has %d words and ends\\n\"}\n", i, i % 17);
  fclose(file);
  run(0, "60000 documents", MOE_DATA " tokenize a.jsonl --tokenizer bytes --output w1 --workers 1");
  run(0, "60000 documents", MOE_DATA " tokenize a.jsonl --tokenizer bytes --output w5 --workers 5");
  run(0, "", "cmp w1.bin w5.bin && cmp w1.idx w5.idx");
}

Test(moe_data, does_not_replace_files_unasked) {
  write_file(in_folder("a.txt"), "one", 3);
  run(0, "", MOE_DATA " tokenize a.txt --tokenizer bytes --output x");
  run(2, "output exists", MOE_DATA " tokenize a.txt --tokenizer bytes --output x");
  write_file(in_folder("a.txt"), "two", 3);
  run(0, "", MOE_DATA " tokenize a.txt --tokenizer bytes --output x --overwrite");
  holds("x", "two$");
}

Test(moe_data, leaves_nothing_behind_when_it_fails) {
  write_file(in_folder("bad.txt"), "fine\nnot \xFF fine", 15);
  run(3, "bad.txt, byte 9", MOE_DATA " tokenize bad.txt --tokenizer bytes --output x");
  run(1, "No such file", MOE_DATA " tokenize none.txt --tokenizer bytes --output x");
  run(3, "not a SentencePiece model", MOE_DATA " tokenize bad.txt --tokenizer bad.txt --output x");
  write_file(in_folder("empty.txt"), "", 0);
  run(2, "no text", MOE_DATA " tokenize empty.txt --tokenizer bytes --output x");
  run(1, "bad.txt: is in the way",
      MOE_DATA " tokenize bad.txt --tokenizer bytes --output bad.txt/x");
  run(0, "left out 1 invalid",
      MOE_DATA " tokenize bad.txt --tokenizer bytes --output y --skip-invalid && rm y.bin y.idx");
  run(0, "2 files", "echo $(ls | wc -l) files");
}

Test(moe_data, stops_when_asked_and_leaves_nothing) {
  run(1, "interrupted",
      "mkfifo silent && timeout --signal=INT --preserve-status 0.5 " MOE_DATA
      " tokenize --input - --tokenizer bytes --output x 0<>silent");
  run(0, "silent 1", "echo $(ls) $(ls | wc -l)");
}

Test(moe_data, trains_and_uses_a_tokenizer) {
  FILE *file = fopen(in_folder("a.txt"), "w");
  for (int i = 0; i < 3000; i++)
    fprintf(
        file,
        "Token %d goes to expert %d: the router of layer %d gives each of four experts a weight, "
        "and a balancing loss keeps their load even while no token is ever dropped.\n",
        i, i % 7, i % 30);
  fclose(file);
  run(0, "t.model: unigram, 300 pieces",
      MOE_DATA " train-tokenizer --input a.txt --vocab-size 300 --output t");
  run(2, "output exists", MOE_DATA " train-tokenizer --input a.txt --vocab-size 300 --output t");
  run(2, "Vocabulary size too high",
      MOE_DATA " train-tokenizer --input a.txt --vocab-size 30000 --output u");
  run(0, "3000 documents",
      MOE_DATA " tokenize a.txt --tokenizer t.model --output a --split-documents lines");
  run(0, "Token 0 goes to expert 0: the router", MOE_DATA " inspect a --tokenizer t.model");
  run(0, "documents    3000", MOE_DATA " inspect a.bin");
  run(0, "sound: 3000 documents", MOE_DATA " verify a --tokenizer t.model");
  run(0, "sound", MOE_DATA " verify a.idx --vocab-size 300");
  run(3, "a.bin, byte", MOE_DATA " verify a --vocab-size 100");
}

Test(moe_data, tells_damaged_files_from_absent_ones) {
  write_file(in_folder("a.txt"), "one", 3);
  run(0, "", MOE_DATA " tokenize a.txt --tokenizer bytes --output x");
  run(1, "cannot open", MOE_DATA " verify y --vocab-size 260");
  run(3, "x.idx, byte", "truncate -s -1 x.idx; " MOE_DATA " verify x --vocab-size 260");
  run(3, "x.idx, byte", MOE_DATA " inspect x");
}
