// Puts tags to sleep: contents to their backups or discarded, physical memory back to the device.
#include "pool/sleep.hpp"

#include <exception>

#include "pool/departure.hpp"
#include "pool/transition.hpp"

namespace cumempool::pool {

Report sleep(Allocator& allocator, const SleepRequest& request) {
  const char* operation = request.drop_backups ? "discard" : "sleep";
  Transition transition(allocator, operation);
  const Clock::time_point start = Clock::now();
  transition.refuse_captures(request.streams);
  Report report = transition.with_overflow([&] {
    Report made;
    Departure departure(allocator, operation, request, made);
    departure.plan(
        transition.claim([&](const Record& candidate) { return departure.wants(candidate); },
                         [&] { departure.admit(); }));
    departure.fence();
    undo_on_failure(departure, [&] {
      departure.start_copies();
      departure.finish();
    });
    departure.commit();
    return made;
  });
  transition.commit();
  report.seconds = seconds_since(start);
  return report;
}

}  // namespace cumempool::pool
