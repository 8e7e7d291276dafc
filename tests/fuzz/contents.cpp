// What the bytes of a piece of memory must be.
#include "contents.hpp"

#include <algorithm>

namespace cumempool::fuzz {
namespace {

std::uint8_t pattern(std::size_t index, std::uint8_t seed) {
  return static_cast<std::uint8_t>(index * 31 + (index >> 8) * 7 + (index >> 12) * 13 +
                                   std::size_t{seed} * 101 + 1);
}

// Simple, so that the compiler makes wide instructions of it: most of the time goes here.
__attribute__((no_sanitize("address", "undefined"))) std::uint8_t differing_bits(
    const std::uint8_t* left, const std::uint8_t* right, const std::uint8_t* mask,
    std::size_t count) noexcept {
  std::uint8_t bits = 0;
  for (std::size_t i = 0; i < count; ++i) {
    bits = static_cast<std::uint8_t>(bits | ((left[i] ^ right[i]) & mask[i]));
  }
  return bits;
}

std::ptrdiff_t distance(std::size_t count) { return static_cast<std::ptrdiff_t>(count); }

}  // namespace

void Contents::fill(std::size_t offset, std::size_t count, std::uint8_t value) {
  std::fill_n(bytes_.begin() + distance(offset), count, value);
  std::fill_n(known_.begin() + distance(offset), count, std::uint8_t{0xFF});
}

void Contents::write(std::size_t offset, std::size_t count, std::uint8_t seed,
                     std::uint8_t* memory) {
  for (std::size_t i = offset; i < offset + count; ++i) bytes_[i] = pattern(i, seed);
  std::fill_n(known_.begin() + distance(offset), count, std::uint8_t{0xFF});
  if (memory != nullptr) std::copy_n(bytes_.begin() + distance(offset), count, memory + offset);
}

void Contents::take(std::size_t offset, const Contents& part) {
  std::copy(part.bytes_.begin(), part.bytes_.end(), bytes_.begin() + distance(offset));
  std::copy(part.known_.begin(), part.known_.end(), known_.begin() + distance(offset));
}

void Contents::forget() noexcept { std::fill(known_.begin(), known_.end(), std::uint8_t{0}); }

void Contents::forget(const Mask& lost) noexcept {
  for (std::size_t i = 0; i < known_.size(); ++i) {
    if (lost[i] != 0) known_[i] = 0;
  }
}

void Contents::forget(std::size_t offset, std::size_t count) noexcept {
  std::fill_n(known_.begin() + distance(offset), count, std::uint8_t{0});
}

Contents Contents::part(std::size_t offset, std::size_t count) const {
  Contents part(count);
  std::copy_n(bytes_.begin() + distance(offset), count, part.bytes_.begin());
  std::copy_n(known_.begin() + distance(offset), count, part.known_.begin());
  return part;
}

std::optional<std::size_t> Contents::difference(const std::uint8_t* memory) const noexcept {
  if (differing_bits(bytes_.data(), memory, known_.data(), size()) == 0) return std::nullopt;
  for (std::size_t i = 0; i < size(); ++i) {
    if (known_[i] != 0 && bytes_[i] != memory[i]) return i;
  }
  return size();  // it changed meanwhile
}

}  // namespace cumempool::fuzz
