#!/usr/bin/env bash
# Counts the instructions of malloc, free, sleep and wake on the host driver with valgrind, so that
# a slower path shows without a GPU. The simulated device's own instructions are left out.
#
#   scripts/instruction_counts.sh [--check]
#
# Writes benchmarks/results/instructions.json; with --check it writes nothing and fails if a path
# needs over 10% more than in that file. BUILD names the build folder.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$root/build/instructions}
allocations=256
paths=(malloc free sleep clean_sleep wake discard remap)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DCUMEMPOOL_BUILD_BENCHMARKS=ON >/dev/null
cmake --build "$build" --target instructions --parallel "$(nproc)" >/dev/null

for path in "${paths[@]}"; do
  # Symbols are bound before main, where nothing is counted. Without its fast bins the heap costs
  # the same each time; with them, any path may pay for its clean-up.
  LD_BIND_NOW=1 GLIBC_TUNABLES=glibc.malloc.mxfast=0 valgrind --quiet --tool=callgrind --collect-atstart=no \
    --toggle-collect="measure_$path" --callgrind-out-file="$work/$path.out" \
    "$build/instructions" "$allocations"
  callgrind_annotate --inclusive=yes --threshold=100 "$work/$path.out" >"$work/$path.txt"
done

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[^=]*=//p' "$build/CMakeCache.txt")
"${PYTHON:-python3}" "$root/scripts/instruction_record.py" "$@" --profiles "$work" \
  --allocations "$allocations" --compiler "$("$compiler" --version | head -n 1)" \
  --record "$root/benchmarks/results/instructions.json"
