// Operations on single allocations: making, freeing, writing, finding.
#include <algorithm>

#include "program.hpp"

#define EACH_OF_8(X, a, b, c, d, e, f, g, h) X(a) X(b) X(c) X(d) X(e) X(f) X(g) X(h)
#define EACH_SLOT(X) EACH_OF_8(X, 0, 1, 2, 3, 4, 5, 6, 7)

#define DECLARE_SLOT(n)                                                \
  void* cumempool_malloc_##n(ssize_t bytes, int device, void* stream); \
  void cumempool_free_##n(void* address, ssize_t bytes, int device, void* stream);
extern "C" {
EACH_SLOT(DECLARE_SLOT)
}

namespace cumempool::fuzz {
namespace {

using SlotMalloc = void* (*)(ssize_t, int, void*);
using SlotFree = void (*)(void*, ssize_t, int, void*);

#define MALLOC_OF(n) &cumempool_malloc_##n,
#define FREE_OF(n) &cumempool_free_##n,
constexpr std::array<SlotMalloc, 8> kSlotMallocs = {EACH_SLOT(MALLOC_OF)};
constexpr std::array<SlotFree, 8> kSlotFrees = {EACH_SLOT(FREE_OF)};

constexpr std::size_t kLargest = std::size_t{1} << 62;
constexpr std::size_t kMostBlocks = 24;

std::size_t round_up(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Mostly a few pages, whole ones or not; now and then nothing, or more than there can be.
std::size_t bytes_of(std::uint8_t choice) {
  constexpr std::array<std::size_t, 8> kOdd = {0,           1,           kLargest,   kLargest + 1,
                                               ~0ULL - 100, 1ULL << 40U, 511 * 4096, 20 * kPage};
  if (choice >= 248) return kOdd.at(choice - 248U);
  const std::size_t pages = 1 + choice % 7U;
  return choice < 160 ? pages * kPage : pages * kPage - (choice * 16U) % kPage;
}

}  // namespace

// ---- making -------------------------------------------------------------------------------------

Expectation Program::expect_malloc(const Tag& tag, int device, std::size_t bytes) {
  if (!tag.declared) return Expectation::of(CUMEMPOOL_UNKNOWN_TAG);
  if (device >= kDevices || bytes == 0 || bytes > kLargest) {
    return Expectation::of(CUMEMPOOL_INVALID_ARGUMENT);
  }
  const bool peers = std::any_of(tag.peers.begin(), tag.peers.end(),
                                 [&](std::int32_t peer) { return peer != device; });
  if (peers && !settings_.peers_reach_each_other) return Expectation::of(CUMEMPOOL_UNSUPPORTED);
  // Memory that waits for its free may go first, and the wake under way may take more.
  const std::uint64_t free = machine_.free_bytes(device);
  if (margin_ + round_up(bytes) > free) {
    Expectation expected = Expectation::of(CUMEMPOOL_OUT_OF_MEMORY);
    expected.success = model_.disturbed || under_way();
    return expected;
  }
  Expectation expected;
  if (under_way()) expected.or_else(CUMEMPOOL_OUT_OF_MEMORY);
  return expected;
}

Block& Program::add_block(cumempool_address address, std::size_t tag, int device,
                          std::size_t bytes) {
  Block block(round_up(bytes));
  MUST_HOLD(address % kPage == 0 && address != 0, "an address that is no address");
  for (const Block& other : model_.blocks) {
    MUST_HOLD(address + block.bytes <= other.address || other.address + other.bytes <= address,
              "memory that overlaps memory that is in use");
  }
  block.id = next_block_++;
  block.allocator = model_.allocator;
  block.address = address;
  block.requested = bytes;
  block.tag = tag;
  block.device = device;
  block.backing = model_.tags.at(tag).backing;
  // What no device may use beyond the bytes asked for stays as it is.
  block.contents.write(0, block.ordinary() ? bytes : block.bytes,
                       static_cast<std::uint8_t>(block.id), bytes_at(address));
  model_.blocks.push_back(std::move(block));
  return model_.blocks.back();
}

// a: tag (low three bits) and device (next two); b: bytes; c: 1 in 8 goes through the slot, 1 in 8
// is to be preserved.
void Program::run_malloc(const Operation& operation) {
  if (model_.blocks.size() == kMostBlocks) return;
  if (under_way()) waking_.crowded = true;
  if (!warm_) fail_nothing();
  const std::size_t bytes = bytes_of(operation.b);
  const int device = (operation.a >> 3U) & 3U;
  const bool through_slot = operation.c % 8 == 7 && slot_;
  const std::size_t tag = through_slot ? slot_->tag : operation.a % 8U % kTags;
  const Expectation expected = expect_malloc(model_.tags.at(tag), device, bytes);
  const bool preserved = through_slot ? slot_->preserves : operation.c % 8 == 6;
  cumempool_address address = 0;
  if (!through_slot) {
    const auto make = preserved ? &cumempool_malloc_preserved : &cumempool_malloc;
    const Result result = call([&] {
      return make(allocator_, model_.tags.at(tag).name.c_str(), device, bytes, &address);
    });
    judge(result, expected);
  } else {
    const std::uint64_t before = machine_.faults().failures();
    const void* pointer =
        kSlotMallocs.at(slot_->number)(static_cast<ssize_t>(bytes), device, nullptr);
    address = reinterpret_cast<std::uintptr_t>(pointer);
    const bool disturbed = machine_.faults().failures() != before;
    model_.disturbed = model_.disturbed || disturbed;
    note("    " + text_of(address));
    const bool serves = slot_->allocator == model_.allocator;
    MUST_HOLD(address == 0 || (expected.success && serves), "memory through a slot that has none");
    MUST_HOLD(address != 0 || !serves || !expected.failures.empty() || disturbed,
              "no memory through a slot, and nothing was in its way");
  }
  if (address != 0) add_block(address, tag, device, bytes).preserved = preserved;
}

// Binds a slot, or unbinds it. a: the tag; b: bit 0 = what it gives is preserved, bit 1 = its tag
// may sleep.
void Program::run_slot(const Operation& operation) {
  if (slot_) {
    judge(call([&] { return cumempool_unbind_slot(slot_->number); }), {});
    slot_.reset();
    return;
  }
  const std::size_t tag = operation.a % kTags;
  const Tag& wanted = model_.tags.at(tag);
  const bool lasting = (operation.b & 2U) != 0;
  const auto bind = lasting ? &cumempool_bind_lasting_slot : &cumempool_bind_slot;
  std::uint32_t number = 0;
  const Result result = call([&] { return bind(allocator_, wanted.name.c_str(), &number); });
  judge(result, Expectation::of(wanted.declared ? CUMEMPOOL_OK : CUMEMPOOL_UNKNOWN_TAG));
  if (!result.ok()) return;
  MUST_HOLD(number < kSlotMallocs.size(), "slots that were unbound are not used again");
  slot_ = Slot{number, model_.allocator, tag, (operation.b & 1U) != 0, lasting};
  if (slot_->preserves) judge(call([&] { return cumempool_preserve_slot(number); }), {});
}

// a: the block.
void Program::run_preserve(const Operation& operation) {
  Block* block = any_block(operation.a);
  if (block == nullptr) return;
  const bool mine = model_.current(*block);
  judge(call([&] { return cumempool_preserve(allocator_, block->address + operation.b); }),
        Expectation::of(mine ? CUMEMPOOL_OK : CUMEMPOOL_NOT_OWNED));
  if (mine) block->preserved = true;
}

// a: pages that have to stay free, mostly none.
void Program::run_margin(const Operation& operation) {
  margin_ = operation.a < 128 ? 0 : operation.a % 16 * kPage;
  judge(call([&] { return cumempool_set_memory_margin(allocator_, margin_); }), {});
}

// ---- freeing ------------------------------------------------------------------------------------

Block* Program::any_block(std::uint8_t choice) {
  return model_.blocks.empty() ? nullptr : &model_.blocks[choice % model_.blocks.size()];
}

// R6: awake or asleep, while it is waking, and after its allocator has gone.
void Program::free_block(std::uint64_t id) {
  Block& block = *model_.find(id);
  if (block.awake() && !waking_has(id) && !block.busy && (!block.vacated || block.ordinary())) {
    const auto wrong = block.contents.difference(bytes_at(block.address));
    MUST_HOLD(!wrong, "contents are wrong before the free");
  }
  const cumempool_address address = block.address;
  model_.remove(id);
  MUST_HOLD(call([&] { return cumempool_free(address); }).ok(), "a free failed");
  judge(call([&] { return cumempool_free(address); }), Expectation::of(CUMEMPOOL_NOT_OWNED));
}

// a: the block, or an address that is none; b: 1 in 4 through a slot's free.
void Program::run_free(const Operation& operation) {
  if (operation.a >= 253 || model_.blocks.empty()) {
    const Block* block = any_block(operation.b);
    const cumempool_address wrong =
        block == nullptr ? operation.b : block->address + 1 + operation.c;
    judge(call([&] { return cumempool_free(wrong); }), Expectation::of(CUMEMPOOL_NOT_OWNED));
    return;
  }
  const Block& block = *any_block(operation.a);
  if (operation.b % 4 != 3) return free_block(block.id);
  const cumempool_address address = block.address;
  model_.remove(block.id);
  kSlotFrees.at(operation.c % kSlotFrees.size())(bytes_at(address), 0, 0, nullptr);
}

// ---- writing ------------------------------------------------------------------------------------

// A block that the program may use now.
Block* Program::writable_block(std::uint8_t choice) {
  Block* block = any_block(choice);
  if (block == nullptr || !block->awake() || waking_has(block->id)) return nullptr;
  return block->vacated && !block->ordinary() ? nullptr : block;
}

namespace {

struct Range {
  std::size_t offset;
  std::size_t bytes;
};

// All of it, or a part of any alignment.
Range range_of(const Block& block, std::uint8_t choice) {
  const std::size_t bytes = block.ordinary() ? block.requested : block.bytes;
  if (choice % 4 == 0) return {0, bytes};
  const std::size_t offset = (choice * 977U) % bytes;
  return {offset, 1 + (choice * 331U) % (bytes - offset)};
}

}  // namespace

// a: the block; b: the pattern; c: where, bit 7 = one of two patterns, so that contents come back
// that were there before.
void Program::run_write(const Operation& operation) {
  Block* block = writable_block(operation.a);
  if (block == nullptr) return;
  if (block->busy) machine_.synchronize();
  block->busy = false;
  const Range range = range_of(*block, operation.c);
  const std::uint8_t seed = (operation.c & 0x80U) != 0 ? operation.b & 1U : operation.b;
  block->contents.write(range.offset, range.bytes, seed, bytes_at(block->address));
}

// The same by work that is in flight until somebody waits for it (R5).
void Program::run_stream_write(const Operation& operation) {
  Block* block = writable_block(operation.a);
  if (block == nullptr) return;
  const Range range = range_of(*block, operation.c);
  if (!machine_.fill(block->device, block->address + range.offset, range.bytes, operation.b))
    return;
  block->contents.fill(range.offset, range.bytes, operation.b);
  block->busy = true;
}

// ---- finding ------------------------------------------------------------------------------------

// a: the block; b: where in it, or past it.
void Program::run_find(const Operation& operation) {
  const Block* block = any_block(operation.a);
  if (block == nullptr) return;
  const bool mine = model_.current(*block);
  const bool past = operation.b == 255;
  const cumempool_address at =
      past ? block->address + block->bytes : block->address + (operation.b * 97U) % block->bytes;
  const bool hit = !past || std::any_of(model_.blocks.begin(), model_.blocks.end(),
                                        [at](const Block& other) { return other.address == at; });
  cumempool_allocation_info info{};
  info.size = sizeof info;
  const Result anywhere = call([&] { return cumempool_find(nullptr, at, &info); });
  judge(anywhere, Expectation::of(hit ? CUMEMPOOL_OK : CUMEMPOOL_NOT_OWNED));
  if (past) return;
  MUST_HOLD(info.address == block->address && info.requested_bytes == block->requested,
            "another allocation was found");
  judge(call([&] { return cumempool_find(allocator_, at, &info); }),
        Expectation::of(mine ? CUMEMPOOL_OK : CUMEMPOOL_NOT_OWNED));
}

}  // namespace cumempool::fuzz
