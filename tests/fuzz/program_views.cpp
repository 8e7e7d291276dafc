// Views of the backups of sleeping memory.
#include <algorithm>

#include "program.hpp"

namespace cumempool::fuzz {

bool Program::has_view(std::size_t allocator) const {
  return std::any_of(views_.begin(), views_.end(),
                     [allocator](const View& view) { return view.allocator == allocator; });
}

// a: the block; b: where; c: bit 0 = to write, the others how long.
void Program::run_view(const Operation& operation) {
  constexpr std::size_t kMostViews = 4;
  const Block* block = any_block(operation.a);
  if (block == nullptr || views_.size() == kMostViews) return;
  const std::size_t offset =
      operation.b % 3 == 0 ? 0 : (operation.b * 613U) % (block->bytes + 10 * (operation.b / 255U));
  const std::size_t bytes =
      operation.c < 8 ? block->bytes : 1 + (operation.c * 449U) % (block->bytes + 16);
  const bool writable = (operation.c & 1U) != 0;
  const bool inside = offset + bytes <= block->bytes;
  Expectation expected;
  if (!model_.current(*block)) {
    expected = Expectation::of(CUMEMPOOL_NOT_OWNED);
  } else if (block->state != CUMEMPOOL_ASLEEP_BACKED_UP) {
    expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  } else if (block->backup_tier == CUMEMPOOL_BACKUP_PEER) {
    expected = Expectation::of(CUMEMPOOL_UNSUPPORTED);
  } else if (!inside) {
    expected = Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  } else {
    // Bytes in one piece may need host memory that the limit does not leave.
    if (settings_.host_limit_pages != 0) expected.or_else(CUMEMPOOL_OUT_OF_HOST_MEMORY);
    const bool touched = !block->dead.empty() && any_set(block->dead, offset, bytes);
    if (touched) expected.or_else(CUMEMPOOL_INVALID_ARGUMENT);
  }
  cumempool_backup_view shown{};
  shown.size = sizeof shown;
  const Result result = call([&] {
    return cumempool_view_backup(allocator_, block->address + offset, bytes, writable ? 1 : 0,
                                 &shown);
  });
  judge(result, expected);
  if (!result.ok()) return;
  MUST_HOLD(shown.data != nullptr && shown.bytes == bytes, "a view shows nothing");
  views_.push_back({shown, block->allocator, block->id, block->epoch, offset, writable,
                    block->contents.part(offset, bytes)});
  check_view(views_.back());
}

void Program::check_view(const View& view) const {
  const auto wrong = view.contents.difference(static_cast<const std::uint8_t*>(view.view.data));
  MUST_HOLD(!wrong, "a view shows wrong contents at " + std::to_string(*wrong));
}

// a: the view; b: the pattern. What is written is what the next wake restores.
void Program::run_view_write(const Operation& operation) {
  if (views_.empty()) return;
  View& view = views_[operation.a % views_.size()];
  check_view(view);
  if (!view.writable) return;
  const std::size_t bytes = view.contents.size();
  for (View& other : views_) {
    if (&other == &view || other.block != view.block || other.epoch != view.epoch) continue;
    const std::size_t from = std::max(view.offset, other.offset);
    const std::size_t to = std::min(view.offset + bytes, other.offset + other.contents.size());
    if (from < to) other.contents.forget(from - other.offset, to - from);
  }
  view.contents.write(0, bytes, operation.b, static_cast<std::uint8_t*>(view.view.data));
  Block* block = model_.find(view.block);
  if (block == nullptr || block->epoch != view.epoch) return;
  block->contents.take(view.offset, view.contents);
}

void Program::end_view(std::size_t index) {
  check_view(views_[index]);
  cumempool_end_backup_view(views_[index].view.lease);
  views_.erase(views_.begin() + static_cast<std::ptrdiff_t>(index));
}

// a: the view.
void Program::run_view_end(const Operation& operation) {
  if (!views_.empty()) end_view(operation.a % views_.size());
}

}  // namespace cumempool::fuzz
