// How the fuzzer reports: the history of the operations, and the end of the process where something
// that must hold does not.
#pragma once

#include <string>

namespace cumempool::fuzz {

// Forgets the history: a new input begins.
void begin_history();
// Adds a line to it; printed at once where CUMEMPOOL_FUZZ_TRACE is set, for findings of sanitizers.
void note(const std::string& line);
// Prints the history and what is wrong, and aborts.
[[noreturn]] void report_finding(const char* file, int line, const std::string& what);

}  // namespace cumempool::fuzz

// The text is made only where it is needed.
#define MUST_HOLD(condition, text)                                                 \
  do {                                                                             \
    if (!(condition)) ::cumempool::fuzz::report_finding(__FILE__, __LINE__, text); \
  } while (false)
