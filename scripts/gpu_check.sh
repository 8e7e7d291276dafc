#!/usr/bin/env bash
# Proves cumempool on a machine with NVIDIA GPUs, without network: install, C++ conformance on the
# cuda driver, GPU tests with skips forbidden, demo, examples, benchmarks. torch, pybind11,
# scikit-build-core, CMake, ninja, GoogleTest and pytest must be there.
#
#   scripts/gpu_check.sh [--release] [--only NAME,NAME] [OUTPUT_DIRECTORY]
#
# --release adds compute-sanitizer over the GPU tests, and the soak of 2000 cycles. --only runs the
# named files of tests (test_memory), examples, and steps (soak) alone; the record lists the others
# as not run. Writes logs and gpu_check.json to the directory and ends with one line: N passed, N
# failed.
set -uo pipefail

release=0
only=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --release) release=1 ;;
    --only) IFS=, read -ra only <<<"${2:?names are missing}" && shift ;;
    *) echo "unknown option: $1" >&2 && exit 2 ;;
  esac
  shift
done
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
mkdir "$work/pytest"

# step NAME COMMAND...: runs it with its output in its own log and notes how it ended.
step() {
  local name=$1 start=$SECONDS code=0
  shift
  "$@" >"$out/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - start))" >>"$steps"
  {
    echo "== $name, $((SECONDS - start)) s: $*"
    if [ "$code" -eq 0 ]; then
      tail -n "${TAIL:-4}" "$out/$name.log"
    else
      echo "-- $name failed with $code"
      tail -n 60 "$out/$name.log"
    fi
  } >"$work/$name.said"
  cat "$work/$name.said"
}

build_cpp() {
  cmake -S "$root" -B "$work/build" -G Ninja -DCUMEMPOOL_BUILD_TESTS=ON \
    -DCUMEMPOOL_BUILD_BENCHMARKS=ON &&
    cmake --build "$work/build"
}

# Runs one process per file of tests, so that the others still report if one crashes.
pytest_file() {
  local start=$SECONDS
  (cd "$root" && "$python" -m pytest "tests/gpu/$1.py" -p no:cacheprovider -s -q \
    --junitxml="$work/pytest/$1.xml") >"$work/$1.log" 2>&1 || : >"$work/$1.failed"
  echo "-- $1, $((SECONDS - start)) s: $(tail -n 1 "$work/$1.log")"
}

# Collects the results of all files; fails if one failed.
pytest_gpu() {
  local log name code=0
  for log in "$work"/test_*.log; do
    name=$(basename "$log" .log)
    echo "---- $name"
    cat "$log"
    [[ ! -e $work/$name.failed ]] || code=1
  done
  return $code
}

# job NAME: a file of tests, an example, or one of these.
job() {
  case $1 in
    test_*) pytest_file "$1" ;;
    # The conformance suite on the cuda driver beside the same suite on the host driver.
    conformance)
      step conformance "$work/build/cumempool_tests" --gtest_filter='*Conformance*' \
        --gtest_output="json:$work/conformance.json"
      ;;
    # A sample of the failed driver calls that the sweep tries on the host driver.
    failure_sweep)
      TAIL=6 step failure_sweep "$work/build/cumempool_tests" \
        --gtest_filter='SampledSweep.R4_R13_OnTheCudaDriver'
      ;;
    doctor) TAIL=30 step doctor "$python" -m cumempool doctor ;;
    selftest) TAIL=20 step selftest "$python" -m cumempool selftest ;;
    demo) TAIL=20 step demo "$python" -m cumempool demo --driver cuda --mib 1024 ;;
    bench) TAIL=10 step bench "$python" -m cumempool bench --gib 4 ;;
    malloc_path) TAIL=12 step malloc_path "$work/build/malloc_path" ;;
    compute_sanitizer)
      TAIL=30 TEST_SWEEP_POINTS=2 step compute_sanitizer \
        "$root/scripts/compute_sanitizer.sh" "$work/build"
      ;;
    soak)
      TAIL=8 step soak "$python" "$root/scripts/soak.py" --directory "$work" \
        --output "$out/soak.json"
      ;;
    *) TAIL=24 step "example_$1" "$python" "$root/examples/$1.py" ;;
  esac
}

# wanted NAME...: prints the names that this machine can run.
wanted() {
  local name
  for name in "$@"; do
    [[ " ${not_run[*]} " == *" $name "* ]] || printf '%s\n' "$name"
  done
}

# each_by WORKERS NAME...: so many workers to a GPU, each of which takes the next one.
each_by() {
  local device name worker workers=$1
  shift
  for device in "${devices[@]}"; do
    for ((worker = 0; worker < workers; worker++)); do
      for name in $(wanted "$@"); do
        ! mkdir "$work/taken.$name" 2>/dev/null || CUDA_VISIBLE_DEVICES=$device job "$name"
      done &
    done
  done
}

# Jobs that neither read used memory nor time anything: three at a time on each GPU, since most of
# their time is the start of processes; more would wait for each other. Jobs for all GPUs run
# beside.
together() {
  local name
  each_by 3 "${on_one[@]}"
  for name in $(wanted "${on_all[@]}"); do job "$name" & done
  wait
}

# Jobs that need a GPU for themselves.
one_to_a_gpu() {
  each_by 1 "${alone[@]}"
  wait
}

# Jobs that need all GPUs for themselves.
one_after_another() {
  local name
  for name in $(wanted "${alone_on_all[@]}"); do job "$name"; done
}

step install "$python" -m pip install --no-build-isolation --no-deps --force-reinstall "$root"
# Does not run jobs whose package or GPUs are missing, and names them with the reason.
not_run=()
leave_out() {
  echo "-- not run, since $1: ${*:2}"
  not_run+=("${@:2}")
  local name
  for name in "${@:2}"; do printf '%s\t%s\n' "$name" "$1" >>"$work/not_run.tsv"; done
}
# Succeeds if Python finds all the packages.
has() {
  "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    "$@" 2>/dev/null
}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
else
  mapfile -t devices < <(seq 0 $((gpus - 1)))
fi
"$python" -c 'import cumempool.integrations.nixl as n, sys; sys.exit(not n.is_installed())' 2>/dev/null ||
  leave_out "NIXL is not installed" test_nixl test_nixl_sleeps
has starlette uvicorn || leave_out "Starlette or uvicorn is not installed" model_switch
if ((gpus < 2)); then
  leave_out "there is one GPU" ray_actors
elif ! has ray; then
  leave_out "Ray is not installed" ray_actors
fi

# Longest first. test_distributed and test_nixl run the examples tensor_parallel and
# nixl_kv_transfer, and check more. NIXL copies through host memory in small pieces; on a GPU that
# others use, each would wait for a time slice: it reached 0.03 GB/s instead of 0.46.
alone=(test_compat_torch_memory_saver test_compat_vllm rlhf_loop llm_sleep_wake test_training
  test_graph_pool test_memory test_frees test_scopes test_all_threads selftest test_cost bench demo malloc_path)
alone_on_all=(conformance test_several_devices test_backups test_sharing test_nccl
  test_distributed test_nixl test_nixl_sleeps)
on_all=(failure_sweep ray_actors)
on_one=(test_docs test_hostile test_process test_threads test_graph_processes test_routing
  model_switch doctor)
if ((release)); then
  alone=(soak compute_sanitizer "${alone[@]}")
fi
elsewhere=(tensor_parallel nixl_kv_transfer)
for file in "$root"/tests/gpu/test_*.py "$root"/examples/*.py; do
  name=$(basename "$file" .py)
  [[ " ${alone[*]} ${alone_on_all[*]} ${on_all[*]} ${on_one[*]} ${elsewhere[*]} " == *" $name "* ]] ||
    on_one+=("$name")
done

if ((${#only[@]})); then
  all=("${alone[@]}" "${alone_on_all[@]}" "${on_all[@]}" "${on_one[@]}")
  for name in "${only[@]}"; do
    [[ " ${all[*]} " == *" $name "* ]] || { echo "unknown name: $name" >&2 && exit 2; }
  done
  others=()
  for name in "${all[@]}"; do
    [[ " ${only[*]} ${not_run[*]} " == *" $name "* ]] || others+=("$name")
  done
  leave_out "it was not asked for" "${others[@]}"
fi

step build build_cpp
together
one_to_a_gpu
one_after_another
! compgen -G "$work/test_*.log" >/dev/null || TAIL=20 step pytest pytest_gpu

commit=${CUMEMPOOL_COMMIT:-$(git -C "$root" rev-parse --verify -q HEAD || echo unknown)}
"$python" "$root/scripts/gpu_record.py" --commit "$commit" --steps "$steps" \
  --not-run "$work/not_run.tsv" \
  --pytest "$work/pytest" --conformance "$work/conformance.json" \
  --malloc-path "$out/malloc_path.log" --output "$out/gpu_check.json"
