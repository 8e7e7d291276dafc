// The history of the operations, and how a finding ends the process.
#include "finding.hpp"

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cumempool::fuzz {
namespace {

std::vector<std::string>& history() {
  static std::vector<std::string> lines;
  return lines;
}

bool traces() {
  static const bool wanted = std::getenv("CUMEMPOOL_FUZZ_TRACE") != nullptr;  // NOLINT: one thread
  return wanted;
}

}  // namespace

void begin_history() { history().clear(); }

void note(const std::string& line) {
  if (traces()) std::fprintf(stderr, "%s\n", line.c_str());
  history().push_back(line);
}

void report_finding(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "\n==== finding; the operations were\n");
  for (const std::string& one : history()) std::fprintf(stderr, "%s\n", one.c_str());
  std::fprintf(stderr, "==== %s:%d: %s\n", file, line, what.c_str());
  std::abort();
}

}  // namespace cumempool::fuzz
