// What the bytes of a piece of memory must be, as far as anybody can know.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace cumempool::fuzz {

// Bytes of a mask are 0xFF or 0.
using Mask = std::vector<std::uint8_t>;

class Contents {
 public:
  // Nothing is known.
  explicit Contents(std::size_t bytes) : bytes_(bytes), known_(bytes) {}

  std::size_t size() const noexcept { return bytes_.size(); }

  void fill(std::size_t offset, std::size_t count, std::uint8_t value);
  // Writes a pattern, which differs from place to place, here and to `memory`, where there is any.
  void write(std::size_t offset, std::size_t count, std::uint8_t seed, std::uint8_t* memory);
  // What `part` knows of the bytes from `offset` on.
  void take(std::size_t offset, const Contents& part);
  void forget() noexcept;
  void forget(const Mask& lost) noexcept;
  void forget(std::size_t offset, std::size_t count) noexcept;
  // `count` bytes from `offset` on.
  Contents part(std::size_t offset, std::size_t count) const;

  // Where `memory` first differs from what is known.
  std::optional<std::size_t> difference(const std::uint8_t* memory) const noexcept;

 private:
  std::vector<std::uint8_t> bytes_;
  Mask known_;
};

}  // namespace cumempool::fuzz
