// The libFuzzer target: an input is a program of operations on the C interface, over a simulated
// driver whose calls fail where the input says so, and a simple model says what must hold.
//
// Held to: addresses are stable and memory does not overlap (R2); contents return, or the error
// says so (R4); a failed transition changes nothing, and can be repeated (R4); work in flight is
// waited for (R5); freeing works in every state (R6); errors are complete (R12); numbers add up to
// what the driver gave (R13); and in the end the driver has everything back, with no descriptor or
// file left. What fails by the program's own doing must fail as documented, and what nothing is in
// the way of must succeed.
//
// scripts/fuzz.sh builds and runs it. CUMEMPOOL_FUZZ_TRACE=1 prints operations as they are carried
// out. corpus/ holds inputs that together reach what is known to be reachable; operations_replay
// runs them without libFuzzer, in every build of the tests.
#include <cstddef>
#include <cstdint>
#include <filesystem>

#include "finding.hpp"
#include "machine.hpp"
#include "operation.hpp"
#include "program.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace cumempool::fuzz;
  begin_history();
  (void)file_directory();
  const std::size_t descriptors = open_descriptors();
  {
    const Input input = decode(data, size);
    Program program(input.settings);
    for (const Operation& operation : input.operations) program.run(operation);
    program.end();
  }
  MUST_HOLD(open_descriptors() == descriptors, "descriptors are left open");
  MUST_HOLD(std::filesystem::is_empty(file_directory()), "files are left behind");
  return 0;
}
