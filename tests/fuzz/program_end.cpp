// The end of a program: all contents are seen once more, and everything goes back.
#include <unistd.h>

#include <algorithm>

#include "program.hpp"

namespace cumempool::fuzz {

void Program::end() {
  note("the end");
  drop_waking();  // and nothing fails from here on
  for (int device = 0; device < kDevices; ++device) {
    if (machine_.capturing(device)) machine_.set_capturing(device, false);
  }
  check();
  end_sharing();
  if (settings_.closes_by_force) {
    run_close({Kind::kClose, 1, 0, 0});
  } else {
    while (!views_.empty()) end_view(0);
  }
  const auto awake = [this](const Block& block) {
    return model_.current(block) && block.awake() && !block.ordinary();
  };
  for (auto found = std::find_if(model_.blocks.begin(), model_.blocks.end(), awake);
       found != model_.blocks.end();
       found = std::find_if(model_.blocks.begin(), model_.blocks.end(), awake)) {
    free_block(found->id);
  }
  for (std::size_t tag = 0; tag < kTags; ++tag) wake_and_free(tag);
  while (!model_.blocks.empty()) free_block(model_.blocks.front().id);
  while (!views_.empty()) end_view(0);
  if (slot_) run_slot({Kind::kSlot, 0, 0, 0});
  check();
  end_old();
  judge(call([&] { return cumempool_allocator_close(allocator_, 0); }), {});
  cumempool_allocator_destroy(allocator_);
  allocator_ = nullptr;
}

// R4: what sleeps can still be woken, where there is room, and has its contents.
void Program::wake_and_free(std::size_t tag) {
  if (!model_.tags.at(tag).declared) return;
  WakeSpec spec;
  spec.tags.at(tag) = true;
  note("wake " + std::to_string(tag));
  wake_now(spec, false, false);
  check();
  std::vector<std::uint64_t> ids;
  for (const Block& block : model_.blocks) {
    if (block.tag == tag) ids.push_back(block.id);
  }
  for (const std::uint64_t id : ids) free_block(id);
}

void Program::end_sharing() {
  while (!model_.shares.empty()) close_share(0, true);
  for (const Export& exported : exports_) ::close(exported.descriptor);
  exports_.clear();
  if (shares_leaked_) machine_.expect_leaks();
}

// Closing once more gives back what had to stay while it was looked at.
void Program::end_old() {
  for (cumempool_allocator* old : old_) {
    judge(call([&] { return cumempool_allocator_close(old, 1); }), {});
    cumempool_allocator_destroy(old);
  }
  old_.clear();
}

}  // namespace cumempool::fuzz
