// Greedy generation with a compiled model, from token ids to token ids:
//
//   rotquant_generate model.rq --tokens 1,15,27 --max-tokens 32
//
// prints the new tokens, one line, separated by commas. Nothing of Python runs. A tokenizer for C++ (such as
// mlc-ai/tokenizers-cpp) reads the artifact's tokenizer.json.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "artifact.h"
#include "session.h"

namespace {

struct Arguments {
  std::string artifact;
  std::vector<int32_t> tokens;
  int64_t max_tokens = 32;
  int64_t capacity = 0;  // 0: the artifact's own
};

int64_t Integer(const std::string& text, int64_t least, int64_t most) {
  size_t used = 0;
  long long value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (text.empty() || used != text.size() || value < least || value > most) {
    throw std::runtime_error("'" + text + "' is no number from " + std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

Arguments Parse(int argc, char** argv) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      arguments.artifact = word;
      continue;
    }
    if (i + 1 == argc) throw std::runtime_error(word + " needs a value");
    std::string value = argv[++i];
    if (word == "--tokens") {
      std::istringstream list(value);
      for (std::string id; std::getline(list, id, ',');) {
        arguments.tokens.push_back(static_cast<int32_t>(Integer(id, 0, kMost)));
      }
    } else if (word == "--max-tokens") {
      arguments.max_tokens = Integer(value, 1, kMost);
    } else if (word == "--capacity") {
      arguments.capacity = Integer(value, 1, kMost);
    } else {
      throw std::runtime_error("unknown option " + word);
    }
  }
  if (arguments.artifact.empty() || arguments.tokens.empty()) {
    throw std::runtime_error("usage: rotquant_generate MODEL.rq --tokens ID,ID,… [--max-tokens N] [--capacity N]");
  }
  return arguments;
}

int Run(const Arguments& arguments) {
  rotquant::Artifact artifact = rotquant::ReadArtifact(arguments.artifact);
  rotquant::Session session(artifact, arguments.capacity ? arguments.capacity : artifact.default_capacity);
  std::fprintf(stderr, "KV cache: %zu bytes\n", session.cache_bytes());
  std::vector<float> logits = session.Prefill(arguments.tokens);
  for (int64_t count = 0;; ++count) {
    auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    if (artifact.eos_tokens.count(best)) break;
    std::cout << (count ? "," : "") << best << std::flush;
    if (count + 1 == arguments.max_tokens) break;
    logits = session.Decode(static_cast<int32_t>(best));
  }
  std::cout << std::endl;
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(Parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return EXIT_FAILURE;
  }
}
