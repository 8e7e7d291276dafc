// What the kernel leaves of host memory: limits of control groups at every level, of both versions,
// and what of their use can be reclaimed.
#include "backup/host_limits.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "host_root.hpp"

namespace cumempool::tests {
namespace {

using backup::host_room;
using backup::HostRoom;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;

HostRoom room_of(const HostRoot& root) { return host_room(root.path()); }

TEST(HostRoom, WhereNothingCanBeReadNothingIsRefused) {
  const HostRoot root;
  EXPECT_EQ(room_of(root).bytes, HostRoom::kUnknown);
  EXPECT_EQ(room_of(root).for_backups(), HostRoom::kUnknown);
}

TEST(HostRoom, WithoutGroupsItIsWhatTheMachineHasLeft) {
  HostRoot root;
  root.machine(4 * kGiB, kGiB);
  EXPECT_EQ(room_of(root).bytes, kGiB);
  EXPECT_EQ(room_of(root).limit, 4 * kGiB);
  EXPECT_EQ(room_of(root).source, "/proc/meminfo");
}

TEST(HostRoom, TheGroupOfTheProcessCountsThatIsBelowTheMount) {
  HostRoot root;
  root.machine(64 * kGiB, 32 * kGiB);
  root.process("0::/system.slice/job.scope\n",
               "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n");
  root.write("/sys/fs/cgroup/system.slice/job.scope/memory.max", "1073741824\n");
  root.write("/sys/fs/cgroup/system.slice/job.scope/memory.current", "268435456\n");
  EXPECT_EQ(room_of(root).bytes, 768 * kMiB);
  EXPECT_EQ(room_of(root).limit, kGiB);
  EXPECT_EQ(room_of(root).source, "/sys/fs/cgroup/system.slice/job.scope/memory.max");
}

TEST(HostRoom, EveryLevelUpToTheMountCountsAndTheTightestDecides) {
  HostRoot root;
  root.machine(64 * kGiB, 32 * kGiB);
  root.process("4:cpu,memory:/slurm/job_7/step_0\n0::/\n",
               "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
               "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
  const std::string top = "/sys/fs/cgroup/memory";
  root.first_version(top, std::uint64_t{9223372036854771712U}, 50 * kGiB);
  root.first_version(top + "/slurm/job_7", 2 * kGiB, kGiB);
  root.first_version(top + "/slurm/job_7/step_0", 4 * kGiB, kGiB);
  EXPECT_EQ(room_of(root).bytes, kGiB);
  EXPECT_EQ(room_of(root).source, top + "/slurm/job_7/memory.limit_in_bytes");
  root.first_version(top + "/slurm/job_7/step_0", 4 * kGiB, 4 * kGiB - kMiB);
  EXPECT_EQ(room_of(root).bytes, kMiB);
  root.first_version(top, 50 * kGiB, 60 * kGiB);
  EXPECT_EQ(room_of(root).bytes, 0U) << "over its limit already";
}

TEST(HostRoom, InAContainerThePathBeginsAtWhatIsMounted) {
  HostRoot root;
  root.machine(64 * kGiB, 32 * kGiB);
  const char* const mounts =
      "30 23 0:26 /docker/ab\\040c /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw\n";
  root.write("/sys/fs/cgroup/memory.max", "1073741824");
  root.write("/sys/fs/cgroup/memory.current", "0");
  root.write("/sys/fs/cgroup/inner/memory.max", "1048576");
  root.write("/sys/fs/cgroup/inner/memory.current", "0");
  root.process("0::/docker/ab c\n", mounts);
  EXPECT_EQ(room_of(root).bytes, kGiB);
  root.process("0::/docker/ab c/inner\n", mounts);
  EXPECT_EQ(room_of(root).bytes, kMiB);
  for (const char* const elsewhere : {"0::/docker/ab cd\n", "0::/../other\n", "0::/\n"}) {
    root.process(elsewhere, mounts);
    EXPECT_EQ(room_of(root).bytes, kGiB) << elsewhere;
  }
}

TEST(HostRoom, PageCacheIsRoomAndSharedMemoryIsNot) {
  HostRoot root;
  root.machine(64 * kGiB, 32 * kGiB);
  root.process("0::/job\n", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  root.write("/sys/fs/cgroup/job/memory.max", std::to_string(kGiB));
  root.write("/sys/fs/cgroup/job/memory.current", std::to_string(kGiB));
  root.write("/sys/fs/cgroup/job/memory.stat",
             "anon 1\nfile 536870912\nshmem 268435456\ninactive_anon 268435456\n"
             "active_file 67108864\ninactive_file 201326592\nslab_reclaimable 1048576\n");
  EXPECT_EQ(room_of(root).bytes, 257 * kMiB);
}

TEST(HostRoom, TheFirstVersionCountsTheCacheOfTheGroupsBelowAsWell) {
  HostRoot root;
  root.process("9:memory:/job\n", "35 31 0:32 / /cg rw shared:4 - cgroup cgroup rw,memory\n");
  root.first_version("/cg/job", kGiB, kGiB);
  root.write("/cg/job/memory.stat",
             "inactive_file 1048576\ntotal_inactive_file 2097152\ntotal_active_file 1048576\n");
  EXPECT_EQ(room_of(root).bytes, 3 * kMiB);
}

TEST(HostRoom, SomeOfItIsKeptBack) {
  const HostRoom room{2 * kGiB, 64 * kGiB, "/x"};
  EXPECT_LE(room.for_backups(), kGiB);
  EXPECT_GE(room.for_backups(), 900 * kMiB);
  EXPECT_EQ((HostRoom{kMiB, kGiB, "/x"}.for_backups()), 0U);
  const Error error = room.refusal(3 * kGiB);
  EXPECT_EQ(error.status, CUMEMPOOL_OUT_OF_HOST_MEMORY);
  for (const char* const part : {"needs 3.00 GiB", "2.00 GiB are left of the 64.00 GiB of /x"}) {
    EXPECT_NE(error.message().find(part), std::string::npos) << error.message();
  }
}

TEST(HostRoom, WhatIsNoNumberIsNoLimit) {
  HostRoot root;
  root.machine(4 * kGiB, kGiB);
  root.process("rubbish\n0::/job\n:::\n", "- -\n1 2 3\n30 23 0:26 / /cg rw - cgroup2 x rw\n - \n");
  for (const char* const text : {"max\n", "", "rubbish", "-1"}) {
    root.write("/cg/job/memory.max", text);
    root.write("/cg/job/memory.current", "0");
    EXPECT_EQ(room_of(root).bytes, kGiB) << text;
  }
  root.write("/cg/job/memory.max", "4096");
  root.write("/cg/job/memory.current", "rubbish");
  EXPECT_EQ(room_of(root).bytes, kGiB);
}

TEST(HostRoom, ThisProcessHasSome) {
  EXPECT_GT(host_room().bytes, 0U);
  EXPECT_LT(host_room().bytes, HostRoom::kUnknown);
}

}  // namespace
}  // namespace cumempool::tests
