// The bridge to SentencePiece. Every entry catches everything: std::bad_alloc on hostile models and
// huge texts is the exception to expect.
#include "data/sentencepiece.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace sp = sentencepiece;

struct moe_sentencepiece {
  sp::SentencePieceProcessor processor;
};

namespace {

// The library's words without its source position: "./src/x.cc(12) [condition] words".
void say(char *error, const char *what) {
  const char *position = strstr(what, ".cc(");
  const char *words = position ? strstr(position, "] ") : nullptr;
  if (words) what = words[2] ? words + 2 : "the library cannot parse it";
  snprintf(error, MOE_SENTENCEPIECE_ERROR, "%s", what);
  for (char *c = error; *c; c++)
    if (*c == '\n') *c = ' ';
}

// Runs body() -> T; on an exception fills `error` and gives `otherwise`.
template <typename T, typename Body> T guarded(char *error, T otherwise, Body body) {
  try {
    return body();
  } catch (const std::exception &e) {
    say(error, e.what());
  } catch (...) {
    say(error, "unknown exception");
  }
  return otherwise;
}

char *copied(const std::string &text, int64_t *length, char *error) {
  char *copy = static_cast<char *>(malloc(text.size() + 1));
  if (!copy) {
    say(error, "out of memory");
    return nullptr;
  }
  memcpy(copy, text.data(), text.size());
  copy[text.size()] = 0;
  *length = static_cast<int64_t>(text.size());
  return copy;
}

// Hands our sentences to the trainer.
class Sentences final : public sp::SentenceIterator {
public:
  Sentences(moe_next_sentence next, void *context) : next_(next), context_(context) {
    Next();
  }
  bool done() const override {
    return done_;
  }
  void Next() override {
    const char *text = nullptr;
    int64_t length = 0;
    status_ = next_(context_, &text, &length, &done_);
    if (status_ != MOE_OK) done_ = true;
    if (!done_) value_.assign(text, static_cast<size_t>(length));
  }
  const std::string &value() const override {
    return value_;
  }
  sp::util::Status status() const override {
    if (status_ == MOE_OK) return sp::util::Status();
    return sp::util::Status(sp::util::StatusCode::kInternal, "input");
  }
  moe_status input_status() const {
    return status_;
  }

private:
  moe_next_sentence next_;
  void *context_;
  moe_status status_ = MOE_OK;
  bool done_ = false;
  std::string value_;
};

std::unordered_map<std::string, std::string> training_options(const moe_tokenizer_training &o) {
  return {
      {"model_type", o.model_type},
      {"vocab_size", std::to_string(o.vocab_size)},
      {"character_coverage", std::to_string(o.character_coverage)},
      {"input_sentence_size", std::to_string(o.max_sentences)},
      {"shuffle_input_sentence", "true"},
      {"num_threads", std::to_string(o.threads)},
      {"max_sentence_length", std::to_string(static_cast<int>(MOE_TOKENIZER_SENTENCE_BYTES))},
      // the text comes back exactly as it was
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"split_digits", "true"},
      {"byte_fallback", "true"},
      {"pad_id", "0"},
      {"unk_id", "1"},
      {"bos_id", "2"},
      {"eos_id", "3"},
      {"pad_piece", "<pad>"},
      {"unk_piece", "<unk>"},
      {"bos_piece", "<bos>"},
      {"eos_piece", "<eos>"},
      {"minloglevel", "2"}, // errors only; progress is the caller's
  };
}

} // namespace

moe_sentencepiece *moe_sentencepiece_load(const void *model, int64_t size, char *error) {
  return guarded<moe_sentencepiece *>(error, nullptr, [&]() -> moe_sentencepiece * {
    auto p = std::make_unique<moe_sentencepiece>(); // loading may throw
    const auto status = p->processor.LoadFromSerializedProto(
        absl::string_view(static_cast<const char *>(model), static_cast<size_t>(size)));
    if (status.ok()) return p.release();
    say(error, status.message());
    return nullptr;
  });
}

void moe_sentencepiece_free(moe_sentencepiece *p) {
  delete p;
}

int moe_sentencepiece_size(const moe_sentencepiece *p) {
  return p->processor.GetPieceSize();
}

int moe_sentencepiece_special(const moe_sentencepiece *p, int which) {
  switch (which) {
  case MOE_TOKEN_PAD:
    return p->processor.pad_id();
  case MOE_TOKEN_UNK:
    return p->processor.unk_id();
  case MOE_TOKEN_BOS:
    return p->processor.bos_id();
  case MOE_TOKEN_EOS:
    return p->processor.eos_id();
  default:
    return -1;
  }
}

bool moe_sentencepiece_encode(const moe_sentencepiece *p, const char *text, int64_t length,
                              moe_token_list *out, char *error) {
  return guarded<bool>(error, false, [&] {
    std::vector<int> ids;
    const auto status =
        p->processor.Encode(absl::string_view(text, static_cast<size_t>(length)), &ids);
    if (!status.ok()) {
      say(error, status.message());
      return false;
    }
    return moe_token_list_append(out, ids.data(), static_cast<int64_t>(ids.size())) == MOE_OK;
  });
}

char *moe_sentencepiece_decode(const moe_sentencepiece *p, const int32_t *ids, int64_t count,
                               int64_t *length, char *error) {
  return guarded<char *>(error, nullptr, [&]() -> char * {
    std::string text;
    const auto status = p->processor.Decode(std::vector<int>(ids, ids + count), &text);
    if (status.ok()) return copied(text, length, error);
    say(error, status.message());
    return nullptr;
  });
}

const char *moe_sentencepiece_piece(const moe_sentencepiece *p, int id) {
  return p->processor.IdToPiece(id).c_str();
}

int moe_sentencepiece_id(const moe_sentencepiece *p, const char *piece) {
  char unused[MOE_SENTENCEPIECE_ERROR];
  return guarded<int>(unused, -1, [&] {
    const int id = p->processor.PieceToId(piece); // the unknown token's id when there is none
    return p->processor.IdToPiece(id) == piece ? id : -1;
  });
}

moe_piece_kind moe_sentencepiece_kind(const moe_sentencepiece *p, int id) {
  const auto &m = p->processor;
  return m.IsUnknown(id)   ? MOE_PIECE_UNKNOWN
         : m.IsControl(id) ? MOE_PIECE_CONTROL
         : m.IsByte(id)    ? MOE_PIECE_BYTE
         : m.IsUnused(id)  ? MOE_PIECE_UNUSED
                           : MOE_PIECE_NORMAL;
}

float moe_sentencepiece_score(const moe_sentencepiece *p, int id) {
  return p->processor.GetScore(id);
}

char *moe_sentencepiece_serialize(const moe_sentencepiece *p, int64_t *size, char *error) {
  return guarded<char *>(
      error, nullptr, [&] { return copied(p->processor.serialized_model_proto(), size, error); });
}

char *moe_sentencepiece_train(const moe_tokenizer_training *options, moe_next_sentence next,
                              void *context, int64_t *size, moe_status *input_status, char *error) {
  *input_status = MOE_OK;
  return guarded<char *>(error, nullptr, [&]() -> char * {
    Sentences sentences(next, context);
    std::string model;
    const auto status =
        sp::SentencePieceTrainer::Train(training_options(*options), &sentences, &model);
    *input_status = sentences.input_status();
    if (status.ok()) return copied(model, size, error);
    say(error, status.message());
    return nullptr;
  });
}
