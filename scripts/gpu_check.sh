#!/usr/bin/env bash
# Proves cumempool on a machine with an NVIDIA GPU, without network: install, C++ conformance on the
# cuda driver, GPU tests with skips forbidden, demo, examples, benchmarks. torch, pybind11,
# scikit-build-core, CMake, ninja, GoogleTest and pytest must be there.
#
#   scripts/gpu_check.sh [OUTPUT_DIRECTORY]
#
# Writes logs and gpu_check.json to the directory and ends with one line: N passed, N failed.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${1:-$root/build/gpu_check}")
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CUMEMPOOL_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
steps="$work/steps.tsv"
: >"$steps"
: >"$work/not_run.tsv"

# step NAME COMMAND...: runs it with its output in a log of its own and notes how it ended.
step() {
  local name=$1 start=$SECONDS code=0
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n "${TAIL:-4}" "$out/$name.log"
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" >>"$steps"
  [ "$code" -eq 0 ] || { echo "-- $name failed with $code"; tail -n 60 "$out/$name.log"; }
}

build_cpp() {
  cmake -S "$root" -B "$work/build" -G Ninja -DCUMEMPOOL_BUILD_TESTS=ON \
    -DCUMEMPOOL_BUILD_BENCHMARKS=ON &&
    cmake --build "$work/build"
}

# The conformance suite on the cuda driver beside the same suite on the host driver.
conformance() {
  "$work/build/cumempool_tests" --gtest_filter='*Conformance*' \
    --gtest_output="json:$work/conformance.json"
}

# A sample of the failed driver calls that the sweep tries on the host driver.
failure_sweep() {
  "$work/build/cumempool_tests" --gtest_filter='SampledSweep.R4_R13_OnTheCudaDriver'
}

# One process per file, so that a crash in one leaves the others to speak. What reads or fills the memory
# of the whole device or times calls runs alone; the others run side by side.
alone="test_memory test_cost test_backups test_hostile test_nixl test_sharing test_distributed
  test_compat_vllm test_compat_torch_memory_saver test_nccl"

pytest_file() {
  (cd "$root" && "$python" -m pytest "tests/gpu/$1.py" -p no:cacheprovider -s -q \
    --junitxml="$work/pytest/$1.xml") >"$work/$1.log" 2>&1 || : >"$work/$1.failed"
}

pytest_gpu() {
  local file name code=0 names=()
  for file in "$root"/tests/gpu/test_*.py; do
    name=$(basename "$file" .py)
    [[ " ${not_run[*]} " != *" $name "* ]] || continue
    names+=("$name")
    [[ " $alone " == *" $name "* ]] || pytest_file "$name" &
  done
  wait
  for name in $alone; do
    [[ " ${not_run[*]} " == *" $name "* ]] || pytest_file "$name"
  done
  for name in "${names[@]}"; do
    echo "---- $name"
    cat "$work/$name.log"
    [[ ! -e $work/$name.failed ]] || code=1
  done
  return $code
}

step install "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$root"
# What needs a package or GPUs that are not there is not run, and named with the reason.
not_run=()
leave_out() {
  echo "-- not run, since $1: ${*:2}"
  not_run+=("${@:2}")
  local name
  for name in "${@:2}"; do printf '%s\t%s\n' "$name" "$1" >>"$work/not_run.tsv"; done
}
# Whether Python finds all the packages.
has() {
  "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    "$@" 2>/dev/null
}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
"$python" -c 'import cumempool.nixl as n, sys; sys.exit(not n.is_installed())' 2>/dev/null ||
  leave_out "NIXL is not installed" test_nixl nixl_kv_transfer
has starlette uvicorn || leave_out "Starlette or uvicorn is not installed" model_switch
if ((gpus < 2)); then
  leave_out "there is one GPU" tensor_parallel ray_actors
elif ! has ray; then
  leave_out "Ray is not installed" ray_actors
fi
step build build_cpp
step conformance conformance
TAIL=6 step failure_sweep failure_sweep
TAIL=60 step pytest pytest_gpu
TAIL=30 step doctor "$python" -m cumempool doctor
TAIL=20 step selftest "$python" -m cumempool selftest
TAIL=20 step demo "$python" -m cumempool demo --driver cuda --mib 1024
TAIL=10 step bench "$python" -m cumempool bench --gib 4
for example in "$root"/examples/*.py; do
  [[ " ${not_run[*]} " != *" $(basename "$example" .py) "* ]] || continue
  TAIL=24 step "example_$(basename "$example" .py)" "$python" "$example"
done
TAIL=12 step malloc_path "$work/build/malloc_path"

commit=${CUMEMPOOL_COMMIT:-$(git -C "$root" rev-parse --verify -q HEAD || echo unknown)}
"$python" "$root/scripts/gpu_record.py" --commit "$commit" --steps "$steps" \
  --not-run "$work/not_run.tsv" \
  --pytest "$work/pytest" --conformance "$work/conformance.json" \
  --malloc-path "$out/malloc_path.log" --output "$out/gpu_check.json"
