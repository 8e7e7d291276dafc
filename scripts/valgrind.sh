#!/usr/bin/env bash
# Runs C++ tests under valgrind's memcheck: no invalid access, no use of uninitialised memory, no
# leak, and no file descriptor left open.
#
#   scripts/valgrind.sh
#
# Takes about three minutes of processor time, and a build. BUILD names the build folder, TIME_LIMIT
# the most seconds. Suppressions, each with its reason, are in scripts/valgrind.supp.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$root/build/valgrind}
limit=${TIME_LIMIT:-900}
logs=$(mktemp -d)
log=$(mktemp)
trap 'rm -rf "$logs" "$log"' EXIT

# Not run under memcheck, and why. All of them run plain and under the other sanitizers.
left_out=(
  # A hundred times as long: thousands of worlds; the sampled sweep below runs some of them.
  'Operations/FailureSweep.*'
  # Millions of digests, to look at their statistics: arithmetic without memory of its own.
  'Digest.DigestsOfAMillionSmallContentsLookRandom'
  'Digest.EveryBitOfTheContentsChangesHalfOfEachHalf'
  # Threads that race for seconds: memcheck runs one at a time; the thread sanitizer checks them.
  'Threads.*' 'RetainingThreads.*'
  # Fork and die, and memcheck would report the child as well.
  '*DeathTest.*' 'Fork.*' '*Processes.*'
  # Ask for more address space than memcheck leaves to a program.
  'Abi.SizesThatCannotBeAreInvalidAndTooLargeOnesOutOfMemory'
  'HostDriverTest.C12_ADeviceLargerThanTheSystemHasIsOutOfMemoryWhenItIsUsed'
  # Needs a GPU. Memcheck does not know memory that libcuda maps; scripts/compute_sanitizer.sh does.
  'Gpu/*' 'SampledSweep.R4_R13_OnTheCudaDriver'
  # The same as on three devices.
  'SampledSweep.R4_R13_OnAHostDriverOf*'
)

cmake -S "$root" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCUMEMPOOL_BUILD_TESTS=ON >/dev/null
cmake --build "$build" --target cumempool_tests >/dev/null

filter=$(IFS=:; echo "-${left_out[*]}")
export TEST_SWEEP_POINTS=2

# shard NUMBER: a part of the tests; as many run side by side as there are processors.
# --fair-sched: threads that wait for each other by polling take turns.
shard() {
  GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$1 timeout "$limit" valgrind --tool=memcheck \
    --error-exitcode=9 --leak-check=full --show-leak-kinds=definite,indirect,possible \
    --errors-for-leak-kinds=definite,indirect,possible --track-fds=yes --fair-sched=yes \
    --num-callers=25 --suppressions="$root/scripts/valgrind.supp" --log-file="$logs/$1" \
    "$build/cumempool_tests" --gtest_brief=1 --gtest_filter="$filter"
}

shards=$(nproc)
running=()
for ((number = 0; number < shards; ++number)); do
  shard "$number" &
  running+=($!)
done
code=0
for process in "${running[@]}"; do wait "$process" || code=$?; done

# Large on purpose: reserved addresses.
cat "$logs"/* | grep -v 'Warning: set address range perms: large range' | sed 's/^==[0-9]*== //' >"$log"
# Standard input, output and error are open at the end; valgrind marks descriptors of the caller as
# inherited.
open=$(grep -c '^Open file descriptor' "$log" || true)
inherited=$(grep -c '<inherited from parent>' "$log" || true)
errors=$(awk '/^ERROR SUMMARY/ { sum += $3; ++runs } END { print runs ? sum : "no" }' "$log")
if ((code != 0 || open > inherited)) || [[ $errors != 0 ]]; then
  cat "$log"
  echo "valgrind: FAILED with status $code, $((open - inherited)) file descriptors left open"
  exit 1
fi
echo "valgrind: $errors errors in $shards parts, 0 file descriptors left open"
