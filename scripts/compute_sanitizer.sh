#!/usr/bin/env bash
# Runs the conformance suite on the cuda driver, the sampled failure sweep and GPU tests under
# compute-sanitizer's memcheck: kernels touch only their own memory. Needs a GPU and the tool.
#
#   scripts/compute_sanitizer.sh [BUILD_FOLDER]
#
# BUILD_FOLDER holds cumempool_tests; without one it is built. Prints the tool's ERROR SUMMARY of
# each run. TIME_LIMIT is the most seconds of all runs (default 540), FILE_LIMIT of one (default
# 120); a run that takes longer says where each thread of it stood.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
deadline=$((SECONDS + ${TIME_LIMIT:-540}))
file_limit=${FILE_LIMIT:-120}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CUMEMPOOL_REQUIRE_GPU=1 PYTHONUNBUFFERED=1

sanitizer=${COMPUTE_SANITIZER:-}
for candidate in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
  /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
  [[ -n $sanitizer ]] || sanitizer=$(command -v "$candidate" || true)
done
if [[ -z $sanitizer ]]; then
  echo "compute-sanitizer is not installed: it is part of the CUDA toolkit"
  exit 1
fi

# --report-api-errors no: the library finds properties of memory by trying (ADR 5), so a good run
#   has calls that fail, such as cuMemCreate with FABRIC handles without an IMEX channel. The tests
#   check the errors of calls.
# --target-processes application-only: children of a test that forks have no context to look at.
# --leak-check is off: it counts memory that torch caches and never gives back. The tests compare
#   the driver's own numbers to see that nothing of ours is left.
memcheck() {
  local name=$1 code=0 left=$((deadline - SECONDS)) started=$SECONDS
  shift
  if ((left <= 0)); then echo "-- $name was not run: the time is up"; return 1; fi
  ((left < file_limit)) || left=$file_limit
  timeout --kill-after=20 "$left" "$sanitizer" --tool memcheck --report-api-errors no \
    --target-processes application-only --error-exitcode 9 --print-limit 20 "$@" \
    >"$work/$name.log" 2>&1 || code=$?
  echo "== $name, $((SECONDS - started)) s"
  grep -E 'ERROR SUMMARY|[0-9]+ (passed|failed)|PASSED|FAILED|sampled sweep' "$work/$name.log"
  if ((code == 0)) && grep -q 'ERROR SUMMARY: 0 errors' "$work/$name.log"; then return 0; fi
  tail -n 80 "$work/$name.log"
  echo "-- $name failed with $code (124: not through when the time was up)"
  return 1
}

build=${1:-}
if [[ -z $build ]]; then
  build=$work/build
  { cmake -S "$root" -B "$build" -G Ninja -DCUMEMPOOL_BUILD_TESTS=ON &&
    cmake --build "$build" --target cumempool_tests; } >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log"; exit 1; }
fi

failed=0
memcheck conformance "$build/cumempool_tests" --gtest_filter='Gpu/*Conformance*' || failed=1
memcheck failure_sweep "$build/cumempool_tests" \
  --gtest_filter='SampledSweep.R4_R13_OnTheCudaDriver' || failed=1

# Files whose tests run in this process; without tests that time calls, compare used device memory
# (the tool uses some), or start a process (the tool does not check it).
left_out='not digests_take_no and not swap and not shrinks and not one_after_another'
left_out+=' and not expandable and not probe and not fills'
# test_threads is left out: under the tool its eight threads do not end within minutes; without the
# tool it takes three seconds.
# pytest's own faulthandler takes signals that the tool needs.
run_pytest='import faulthandler, sys, pytest
faulthandler.dump_traceback_later(float(sys.argv.pop(1)))
sys.exit(pytest.main(sys.argv[1:]))'
for file in contents errors flight routing backups; do
  memcheck "test_$file" "$python" -c "$run_pytest" $((file_limit * 3 / 4)) \
    "$root/tests/gpu/test_$file.py" -p no:cacheprovider -p no:faulthandler -q -s -k "$left_out" ||
    failed=1
done

((failed == 0)) && echo "compute-sanitizer: clean" || echo "compute-sanitizer: FAILED"
exit "$failed"
