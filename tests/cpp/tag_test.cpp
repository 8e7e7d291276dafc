// Tags: which names are taken, what a declaration changes, and what an unknown one is told.
#include "pool/records.hpp"

#include <gtest/gtest.h>

#include <string>

#include "driver/error.hpp"
#include "host_fixture.hpp"

namespace cumempool::tests {
namespace {

using pool::TagTable;

cumempool_status declare(const std::string& name) {
  TagTable tags;
  try {
    tags.declare(name, CUMEMPOOL_ON_SLEEP_UNSET, CUMEMPOOL_ON_WAKE_UNSET);
    return CUMEMPOOL_OK;
  } catch (const Error& error) {
    return error.status;
  }
}

TEST(Tag, NamesAreOneTo255Bytes) {
  EXPECT_EQ(declare(""), CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(declare("x"), CUMEMPOOL_OK);
  EXPECT_EQ(declare(std::string(255, 'x')), CUMEMPOOL_OK);
  EXPECT_EQ(declare(std::string(256, 'x')), CUMEMPOOL_INVALID_ARGUMENT);
}

TEST(Tag, NamesAreUtf8) {
  for (const char* valid :
       {"weights", "kv cache", "gewicht-\xC3\xBC", "\xE6\x9D\x83\xE9\x87\x8D", "\xF0\x9F\x98\xB4",
        "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    EXPECT_EQ(declare(valid), CUMEMPOOL_OK) << valid;
  }
  const char* const invalid[] = {
      "\x80",              // a continuation without a start
      "\xC3",              // cut off
      "\xE6\x9D",          // cut off
      "\xF0\x9F\x98",      // cut off
      "\xC0\xAF",          // overlong
      "\xE0\x80\xAF",      // overlong
      "\xF0\x80\x80\xAF",  // overlong
      "\xED\xA0\x80",      // a surrogate
      "\xF4\x90\x80\x80",  // past U+10FFFF
      "\xF5\x80\x80\x80",  // past U+10FFFF
      "\xFF",              // never used
      "abc\xC3(",          // not followed by a continuation
      "\xE6(\x87",         // the second byte is no continuation
      "\xE6\x9D(",         // the third byte is no continuation
      "\xF0\x9F(\xB4",     // the third byte is no continuation
      "\xF0(\x98\xB4",     // the second byte is no continuation
  };
  for (const char* name : invalid) {
    EXPECT_EQ(declare(name), CUMEMPOOL_INVALID_ARGUMENT) << testing::PrintToString(name);
  }
}

TEST(Tag, AnUnsetPolicyLeavesWhatWasSetBefore) {
  TagTable tags;
  tags.declare("kv", CUMEMPOOL_ON_SLEEP_DISCARD, CUMEMPOOL_ON_WAKE_UNSET);
  const pool::Tag& kv = tags.find("kv");
  tags.declare("kv", CUMEMPOOL_ON_SLEEP_UNSET, CUMEMPOOL_ON_WAKE_ZERO);
  EXPECT_EQ(tags.on_sleep(kv), CUMEMPOOL_ON_SLEEP_DISCARD);
  EXPECT_EQ(tags.on_wake(kv), CUMEMPOOL_ON_WAKE_ZERO);
  tags.declare("kv", CUMEMPOOL_ON_SLEEP_OFFLOAD, CUMEMPOOL_ON_WAKE_UNDEFINED);
  EXPECT_EQ(tags.on_sleep(kv), CUMEMPOOL_ON_SLEEP_OFFLOAD);
  EXPECT_EQ(tags.on_wake(kv), CUMEMPOOL_ON_WAKE_UNDEFINED);
  EXPECT_EQ(&tags.find("kv"), &kv) << "the same tag at the same address";
}

TEST(Tag, PoliciesOutsideTheirEnumsAreRefused) {
  const Host host;
  const Pool pool(host);
  const auto no_such_sleep = static_cast<cumempool_on_sleep>(3);
  const auto no_such_wake = static_cast<cumempool_on_wake>(3);
  EXPECT_EQ(cumempool_declare_tag(pool.get(), "a", no_such_sleep, CUMEMPOOL_ON_WAKE_UNSET),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(cumempool_declare_tag(pool.get(), "a", CUMEMPOOL_ON_SLEEP_UNSET, no_such_wake),
            CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_TRUE(pool.snapshot().tags.empty()) << "nothing was declared";
}

TEST(Tag, R12_AnUnknownTagIsToldTheKnownOnes) {
  const Host host;
  const Pool pool(host);
  EXPECT_EQ(pool.sleep("weights", kOffload).status, CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_NE(std::string(cumempool_last_error()->advice).find("no tag is known yet"),
            std::string::npos);
  pool.declare("weights");
  pool.declare("kv_cache");
  EXPECT_EQ(pool.sleep("wieghts", kOffload).status, CUMEMPOOL_UNKNOWN_TAG);
  const cumempool_error* error = cumempool_last_error();
  EXPECT_STREQ(error->tag, "wieghts");
  EXPECT_STREQ(error->operation, "sleep");
  EXPECT_NE(std::string(error->message).find("'kv_cache', 'weights'"), std::string::npos)
      << error->message;
  EXPECT_EQ(pool.wake({{"weights", "x"}}).status, CUMEMPOOL_UNKNOWN_TAG);
  cumempool_address address = 77;
  EXPECT_EQ(pool.try_malloc("x", 1, 0, address), CUMEMPOOL_UNKNOWN_TAG);
  EXPECT_EQ(address, 77U) << "outputs are untouched on failure";
  std::uint32_t slot = 77;
  EXPECT_EQ(cumempool_bind_slot(pool.get(), "x", &slot), CUMEMPOOL_UNKNOWN_TAG);
}

TEST(Tag, ARequestThatListsATagTwiceIsRefused) {
  const Host host;
  const Pool pool(host);
  pool.declare("kv");
  EXPECT_EQ(pool.sleep({{{"kv", kOffload}, {"kv", kDiscard}}}).status, CUMEMPOOL_INVALID_ARGUMENT);
  EXPECT_EQ(pool.sleep("kv", CUMEMPOOL_ON_SLEEP_UNSET).status, CUMEMPOOL_INVALID_ARGUMENT);
}

TEST(Tag, TagsOfDifferentAllocatorsAreDifferent) {
  const Host host;
  const Pool first(host);
  const Pool second(host);
  first.declare("weights");
  EXPECT_EQ(second.sleep("weights", kOffload).status, CUMEMPOOL_UNKNOWN_TAG);
}

}  // namespace
}  // namespace cumempool::tests
