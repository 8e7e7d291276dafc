// One device's share of a transition.
#include "pool/lane.hpp"

#include <exception>
#include <utility>

namespace cumempool::pool {

void Lane::copy(std::size_t item, const Record& record, cumempool_backup_tier tier,
                const std::function<void()>& start) {
  const Clock::time_point begin = Clock::now();
  transfer.staged.label(item);
  start();
  if (tier == CUMEMPOOL_BACKUP_PAGEABLE || tier == CUMEMPOOL_BACKUP_FILE) {
    front.push_staged(item, record, seconds_since(begin));
  } else {
    front.push(item, record);
  }
}

void Lane::finish_staged(std::size_t& culprit) {
  const Clock::time_point begin = Clock::now();
  try {
    transfer.staged.finish();
  } catch (const Error&) {
    culprit = transfer.staged.failed_label().value_or(culprit);
    throw;
  }
  front.add_staged(seconds_since(begin));
}

Lane* Lanes::find(int device) noexcept {
  for (const auto& lane : lanes_) {
    if (lane->device->ordinal() == device) return lane.get();
  }
  return nullptr;
}

void Lanes::add(const Record& record, std::size_t item) {
  const int device = record.device;
  Lane* lane = find(device);
  if (lane == nullptr) {
    const driver::ContextScope scope(allocator_.driver(), device);
    const std::shared_ptr<Device> on = allocator_.devices().at(device);
    on->settle();
    lanes_.push_back(std::make_unique<Lane>(on, direction_, report_, allocator_.progress()));
    lane = lanes_.back().get();
  }
  lane->items.push_back(item);
  allocator_.progress().total += record.bytes;
}

void Lanes::each_in_turn(const std::function<void(Lane&, std::size_t)>& step) {
  for (bool any = true; any;) {
    any = false;
    for (const auto& lane : lanes_) {
      if (lane->next == lane->items.size()) continue;
      any = true;
      const driver::ContextScope scope(allocator_.driver(), lane->device->ordinal());
      step(*lane, lane->items[lane->next]);
      ++lane->next;
      lane->front.poll();
    }
  }
}

void Lanes::each(const std::function<void(Lane&)>& step) {
  for (const auto& lane : lanes_) {
    const driver::ContextScope scope(allocator_.driver(), lane->device->ordinal());
    step(*lane);
  }
}

void Lanes::settle(Error* failure) noexcept {
  for (const auto& lane : lanes_) {
    lane->device->unsettle();
    try {
      const driver::ContextScope scope(allocator_.driver(), lane->device->ordinal());
      lane->device->settle();
    } catch (const std::exception& caught) {
      lane->stuck = true;
      if (failure != nullptr) add_secondary(*failure, told(caught, "", nullptr));
    }
  }
}

}  // namespace cumempool::pool
