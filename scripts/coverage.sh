#!/usr/bin/env bash
# Counts the branches of cpp/ and src/cumempool that the tests take, and fails if they are too few.
#
#   scripts/coverage.sh                       # builds, runs all C++ and all Python tests, reports
#   scripts/coverage.sh --python-data FOLDER  # takes the Python figure from the data that a run of
#                                             # all Python tests has left there (the settings are in
#                                             # pyproject.toml), and runs only tests of cpp/python
#
# C++: clang's source-based counters. A branch is a condition in the source, taken both ways; an
# exception of a call is no branch. The C++ tests and the Python module are built with them. Python:
# coverage.py, in all processes that the tests start; only branches count here as well. BUILD names
# the build folder, PYTHON the interpreter, LLVM the suffix of the names of LLVM's tools.
set -euo pipefail

least_cpp=90
# tests/python/simulated_cuda.py simulates torch on a GPU here; tests/gpu takes the same branches on
# a real one.
least_python=95

# The only files of cpp/ that are left out: they talk to libcuda, and work only with a GPU. The
# conformance suite runs them there; here a library named libcuda tests how it is opened
# (tests/cpp/cuda_open_test.cpp). digest_kernel.cu is code for a GPU, and not for a host compiler.
left_out=(cpp/driver/cuda_devices.cpp cpp/driver/cuda_driver.cpp cpp/driver/cuda_driver.hpp
  cpp/driver/cuda_fence.cpp cpp/driver/cuda_fence.hpp
  cpp/driver/cuda_kernel.cpp cpp/driver/cuda_kernel.hpp cpp/driver/cuda_library.cpp cpp/driver/cuda_library.hpp
  cpp/driver/cuda_memory.cpp cpp/driver/cuda_work.cpp)
# Python tests that reach every function of cpp/python; the rest of the core has C++ tests.
binding_tests=(tests/python/test_backing.py tests/python/test_backup.py
  tests/python/test_errors.py tests/python/test_probe.py tests/python/test_read_backup.py
  tests/python/test_sharing.py tests/python/test_slots.py tests/python/test_swap.py
  tests/python/test_waking.py)

root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$root/build/coverage}
python=${PYTHON:-python3}
jobs=$(nproc)
python_data=
if [[ ${1:-} == --python-data ]]; then
  python_data=$(cd "$2" && pwd)
fi
cd "$root"
rm -rf "$build/counts"
mkdir -p "$build/counts"

tool() {
  command -v "$1${LLVM:-}" || command -v "$1" || command -v "$1-14"
}

make_package() {
  cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=Debug \
    -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DCUMEMPOOL_COVERAGE=ON -DCUMEMPOOL_BUILD_TESTS=ON \
    -DCUMEMPOOL_BUILD_PYTHON=ON -DPython_EXECUTABLE="$(command -v "$python")" >/dev/null
  cmake --build "$build" --parallel "$jobs" >/dev/null
  # A folder to import the package from: its sources beside the built files.
  local package=$build/package/cumempool
  mkdir -p "$package/lib"
  ln -sfn "$root"/src/cumempool/* "$build"/_core*.so "$package"
  ln -sfn "$build/libcumempool.so" "$package/lib"
}

cpp_tests() {
  # Up to four processes at a time add to one file each.
  LLVM_PROFILE_FILE=$build/counts/cpp-%4m.profraw \
    ctest --test-dir "$build" --parallel "$jobs" --no-tests=error --output-on-failure \
    >"$build/counts/cpp.log" || { cat "$build/counts/cpp.log"; return 1; }
}

# python_tests TEST...: against the package that was built.
python_tests() {
  PYTHONPATH=$build/package LLVM_PROFILE_FILE=$build/counts/python-%4m.profraw \
    "$python" -m pytest -m "" -q -p no:cacheprovider "$@"
}

cpp_report() {
  local sources=() file
  while read -r file; do
    [[ " ${left_out[*]} " == *" $file "* ]] || sources+=("$root/$file")
  done < <(find cpp -name '*.cpp' -o -name '*.hpp' | sort)
  "$(tool llvm-profdata)" merge -o "$build/counts/all.profdata" "$build"/counts/*.profraw
  local arguments=("$build/cumempool_tests" -object "$build/libcumempool.so"
    -object "$(echo "$build"/_core*.so)" -instr-profile "$build/counts/all.profdata")
  "$(tool llvm-cov)" report "${arguments[@]}" -show-branch-summary -show-region-summary=0 \
    "${sources[@]}" >"$build/counts/cpp.txt"
  "$(tool llvm-cov)" export "${arguments[@]}" -summary-only "${sources[@]}" \
    >"$build/counts/cpp.json"
}

python_report() {
  export COVERAGE_FILE=$build/counts/python.data
  "$python" -m coverage combine --quiet --keep "$python_data"/*
  "$python" -m coverage report --show-missing --skip-covered >"$build/counts/python.txt"
  "$python" -m coverage json --quiet -o "$build/counts/python.json"
}

# Prints both figures; fails if one is too low.
figures() {
  "$python" - "$build/counts" "$least_cpp" "$least_python" <<'PYTHON'
import json, pathlib, sys
counts = pathlib.Path(sys.argv[1])
cpp = json.loads((counts / "cpp.json").read_text())["data"][0]["totals"]["branches"]
python = json.loads((counts / "python.json").read_text())["totals"]
good = True
for name, covered, count, least in (
    ("cpp", cpp["covered"], cpp["count"], int(sys.argv[2])),
    ("python", python["covered_branches"], python["num_branches"], int(sys.argv[3])),
):
    percent = 100 * covered / count
    folder = {"cpp": "cpp/", "python": "src/cumempool"}[name]
    print(f"branch coverage of {folder}: {percent:.1f}% ({covered} of {count})")
    if percent < least:
        good = False
        print((counts / f"{name}.txt").read_text(), f"\nless than {least}% of {folder}")
sys.exit(not good)
PYTHON
}

make_package
cpp_tests
if [[ -n $python_data ]]; then
  python_tests "${binding_tests[@]}"
else
  python_data=$build/counts/python
  mkdir "$python_data"
  COVERAGE_PROCESS_START=$root/pyproject.toml COVERAGE_FILE=$python_data/data python_tests
fi
cpp_report
python_report

echo "left out: ${left_out[*]}"
echo "per file: $build/counts/cpp.txt and python.txt"
figures
