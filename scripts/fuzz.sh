#!/usr/bin/env bash
# Fuzzes the C interface on the host driver (tests/fuzz) with libFuzzer and the address, undefined
# and leak sanitizers, and fails on any finding. Needs clang.
#
#   scripts/fuzz.sh [SECONDS]       runs that long, 600 unless told, starting from the kept corpus
#   scripts/fuzz.sh --corpus-only   runs each kept input once
#   scripts/fuzz.sh --minimise      rewrites tests/fuzz/corpus: keeps the fewest inputs of it and of
#                                   earlier runs, that reach the same edges; keeps all inputs named
#                                   caught-*, which show past faults
#
# BUILD names the build folder, by default build/fuzz; new inputs go to BUILD/found, and inputs with
# a finding stay in BUILD/findings. With --corpus-only, BUILD may be the build folder of the C++
# tests: then it builds only the program that replays the corpus.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=$(realpath -m "${BUILD:-$root/build/fuzz}")
corpus=$root/tests/fuzz/corpus
found=$build/found
findings=$build/findings
longest=244 # bytes: settings and 60 operations
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:quarantine_size_mb=64}
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}

# Sanitizers that need fixed addresses fail if the kernel randomises too many address bits.
without_randomisation() {
  if setarch "$(uname -m)" -R true 2>/dev/null; then
    setarch "$(uname -m)" -R "$@"
  else
    "$@"
  fi
}

build_target() {
  local generator=()
  if [[ ! -e $build/CMakeCache.txt ]]; then
    if command -v ninja >/dev/null; then generator=(-G Ninja); fi
    cmake -S "$root" -B "$build" "${generator[@]}" -DCMAKE_CXX_COMPILER="${CXX:-clang++}" \
      -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCUMEMPOOL_BUILD_FUZZERS=ON >/dev/null
  fi
  cmake --build "$build" --target "$1" --parallel "$(nproc)" >"$build/fuzz-build.log" 2>&1 ||
    { cat "$build/fuzz-build.log"; return 1; }
}

# fuzzer ARGUMENT...: runs libFuzzer with the common options.
fuzzer() {
  without_randomisation "$build/operations_fuzz" -max_len="$longest" -timeout=60 \
    -rss_limit_mb=4096 -artifact_prefix="$findings/" "$@"
}

replay() {
  build_target operations_replay
  without_randomisation "$build/operations_replay" "$corpus" 2>"$build/replay.log" ||
    { tail -n 100 "$build/replay.log"; return 1; }
}

minimise() {
  build_target operations_fuzz
  mkdir -p "$found" "$findings"
  rm -rf "$build/minimal"
  mkdir "$build/minimal"
  fuzzer -set_cover_merge=1 -use_counters=0 "$build/minimal" "$corpus" "$found"
  find "$corpus" -type f ! -name 'caught-*' -delete
  cp "$build/minimal"/* "$corpus"
  printf '%d inputs, %d bytes\n' "$(find "$corpus" -type f | wc -l)" \
    "$(cat "$corpus"/* | wc -c)"
}

# Prints the last value of a word in the log: "cov: 123", "stat::...: 123".
last() {
  grep -oE "$1:? +[0-9]+" "$build/fuzz.log" | tail -n 1 | grep -oE '[0-9]+$' || echo 0
}

run() {
  local seconds=$1 status=0 crashes before
  build_target operations_fuzz
  mkdir -p "$found" "$findings"
  before=$(find "$findings" -type f | wc -l)
  # Without the entropic schedule, whose bookkeeping takes longer than the operations.
  fuzzer -max_total_time="$seconds" -entropic=0 -len_control=0 -print_final_stats=1 \
    "$found" "$corpus" >"$build/fuzz.log" 2>&1 || status=$?
  crashes=$(($(find "$findings" -type f | wc -l) - before))
  grep -E '^Done |^#[0-9]+.*DONE' "$build/fuzz.log" || true
  printf 'fuzz: %s executions, %s per second, %s edges covered, %d findings\n' \
    "$(last 'stat::number_of_executed_units:')" "$(last 'stat::average_exec_per_sec:')" \
    "$(last 'cov:')" "$crashes"
  if ((status != 0 || crashes != 0)); then
    grep -A 400 -E '^==== finding|ERROR: |runtime error' "$build/fuzz.log" | head -n 200 || true
    printf 'the input is in %s\n' "$findings"
    return 1
  fi
}

case ${1:-600} in
  --corpus-only) replay ;;
  --minimise) minimise ;;
  *[!0-9]*) echo "usage: scripts/fuzz.sh [SECONDS | --corpus-only | --minimise]" >&2; exit 2 ;;
  *) run "${1:-600}" ;;
esac
