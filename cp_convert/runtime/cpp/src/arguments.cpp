#include "arguments.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>

#include "errors.h"

namespace cp_run {
namespace {

const char* const help = R"(Usage: cp_run BUNDLE --inputs FILE [options]

Runs a bundle of cp-convert: one thread and one GPU a rank, in this process.

  --inputs FILE      safetensors with every input of the manifest
  --outputs FILE     where rank 0's outputs are written, as safetensors
  --repeat N         time N forwards after the first
  --devices 0,1,...  the GPU of every rank  [default: 0 to world - 1]
  --timeout SECONDS  how long ranks may wait for one another in one step  [default: 60]
  --library PATH     TensorRT's library, such as libnvinfer_lean.so.11  [default: as the
                     manifest's backend asks, by the loader's search path]
  --no-verify        do not compare engines and weights with the manifest's SHA-256

Exit codes: 0 done, 2 usage, 6 the bundle is damaged, 7 the run failed.
)";

double number(const std::string& option, const std::string& word) {
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  if (word.empty() || *end != '\0') throw usage(text(option, " ", word, ": not a number."));
  return value;
}

int whole(const std::string& option, const std::string& word) {
  const double value = number(option, word);
  if (value < 0 || value > 1e9 || value != static_cast<int>(value))
    throw usage(text(option, " ", word, ": not a whole number of 0 or more."));
  return static_cast<int>(value);
}

std::vector<int> list(const std::string& option, const std::string& word) {
  std::vector<int> values;
  std::istringstream parts(word);
  for (std::string part; std::getline(parts, part, ',');) values.push_back(whole(option, part));
  return values;
}

double positive(const std::string& option, const std::string& word) {
  const double value = number(option, word);
  if (!(value > 0)) throw usage(text(option, " ", word, ": must be more than 0."));
  return value;
}

using Store = std::function<void(const std::string&)>;

std::map<std::string, Store> stores(Arguments& into) {
  return {
      {"--inputs", [&](const std::string& v) { into.inputs = v; }},
      {"--outputs", [&](const std::string& v) { into.outputs = v; }},
      {"--repeat", [&](const std::string& v) { into.repeat = whole("--repeat", v); }},
      {"--devices", [&](const std::string& v) { into.devices = list("--devices", v); }},
      {"--timeout", [&](const std::string& v) { into.timeout = positive("--timeout", v); }},
      {"--library", [&](const std::string& v) { into.library = v; }},
  };
}

void show_help() {
  std::fputs(help, stdout);
  std::exit(0);
}

}  // namespace

Arguments parse(int count, char** words) {
  Arguments found;
  const auto options = stores(found);
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word == "-h" || word == "--help") show_help();
    const auto option = options.find(word);
    if (option != options.end()) {
      if (++i == count) throw usage(text(word, " needs a value."), "cp_run --help");
      option->second(words[i]);
    } else if (word == "--no-verify") {
      found.verify = false;
    } else if (word.rfind("-", 0) == 0 || !found.bundle.empty()) {
      throw usage(text("unexpected ", word, "."), "cp_run --help");
    } else {
      found.bundle = word;
    }
  }
  if (found.bundle.empty()) throw usage("no bundle is named.", "cp_run --help");
  if (found.inputs.empty()) throw usage("--inputs FILE is missing.", "cp_run --help");
  return found;
}

}  // namespace cp_run
