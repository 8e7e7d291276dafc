#!/usr/bin/env bash
# Builds the sdist, builds the wheel from the sdist, and tries both as a user does: each in a fresh
# environment, the wheel in one without a compiler.
#
#   scripts/check_packages.sh [FOLDER]     # keeps them in FOLDER, in place of older ones
#
# PYTHON names the interpreter. It needs build, twine, and the dependencies of cumempool: the fresh
# environments borrow these, so that torch is not downloaded again.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=${1:-$work/packages}
mkdir -p "$packages"
packages=$(cd "$packages" && pwd)
rm -f "$packages"/cumempool-*
unset PYTHONPATH PYTHONHOME

# quietly COMMAND...: shows its output only if it fails.
quietly() {
  "$@" >"$work/output" 2>&1 || { cat "$work/output"; return 1; }
}

make_environment() {
  "$python" -m venv "$work/$1"
}

# borrow NAME: lets an environment import the packages beside torch; its own packages come first.
borrow() {
  "$python" - "$("$work/$1/bin/python" -c 'import site; print(site.getsitepackages()[0])')" <<'PYTHON'
import importlib.util, pathlib, sys
torch = importlib.util.find_spec("torch")
if torch is None or torch.origin is None:
    sys.exit("this check borrows torch, and this interpreter has none; PYTHON names another")
borrowed = pathlib.Path(torch.origin).parents[1]
pathlib.Path(sys.argv[1], "borrowed.pth").write_text(f"{borrowed}\n")
PYTHON
}

build_packages() {
  quietly "$python" -m build --sdist --outdir "$packages" "$root"
  make_environment compiling
  # Does `pip install cumempool-*.tar.gz` in two steps.
  quietly "$work/compiling/bin/pip" wheel --no-deps --wheel-dir "$packages" "$packages"/*.tar.gz
  quietly "$work/compiling/bin/pip" install --no-deps "$packages"/*.whl
  borrow compiling
}

# Runs the example of the sdist against the package installed from it.
example_runs() {
  mkdir "$work/sdist"
  tar -x -z -f "$(echo "$packages"/*.tar.gz)" -C "$work/sdist" --strip-components=1
  local cmake_dir
  cmake_dir=$("$work/compiling/bin/python" -c 'import cumempool; print(cumempool.get_cmake_dir())')
  quietly cmake -S "$work/sdist/examples/cpp" -B "$work/example" -Dcumempool_DIR="$cmake_dir"
  quietly cmake --build "$work/example"
  "$work/example/sleep_wake" host
}

# Runs with the wheel's files and its dependencies, and no other programs of the machine.
wheel_runs() {
  cd "$work"
  PATH=$work/plain/bin
  local tool
  for tool in c++ cc clang clang++ cmake g++ gcc ld make ninja nvcc; do
    if type "$tool" >/dev/null 2>&1; then
      echo "$tool can be reached from the environment that should have no compiler"
      return 1
    fi
  done
  cumempool --version
  cumempool --help >/dev/null
  cumempool demo --driver host --mib 8
  python - <<'PYTHON'
import importlib, json, pathlib, subprocess, sys
from importlib.metadata import entry_points
import cumempool

here = pathlib.Path(sys.prefix)
places = [cumempool.__file__, cumempool.get_include(), cumempool.get_library()]
assert all(here in pathlib.Path(place).parents for place in places), places
assert cumempool.probe(driver="host").ok

plugins = entry_points(group="vllm.general_plugins", name="cumempool")
assert [callable(plugin.load()) for plugin in plugins] == [True]
for stand_in in ("vllm", "torch_memory_saver"):
    importlib.import_module(f"cumempool.compat.{stand_in}")

# Without a GPU: fails, and says why and what to do. With one: passes.
doctor = subprocess.run(["cumempool", "doctor", "--json"], stdout=subprocess.PIPE)
found = json.loads(doctor.stdout)
failed = [check for check in found["checks"] if check["status"] == "FAIL"]
assert doctor.returncode == (0 if found["passed"] else 1), doctor.returncode
assert found["passed"] == (not failed) and all(one["reason"] and one["fix"] for one in failed)
assert cumempool.is_available() or failed
print(f"doctor: exit code {doctor.returncode};", ", ".join(one["name"] for one in failed), "failed")
PYTHON
}

extras_resolve() {
  local extras
  extras=$("$work/compiling/bin/python" -c 'from importlib.metadata import metadata
print(*metadata("cumempool").get_all("Provides-Extra"), sep=",")')
  quietly "$python" -m pip install --dry-run --constraint "$root/constraints.txt" \
    "$(echo "$packages"/*.whl)[$extras]"
  echo "the extras $extras agree with constraints.txt"
}

build_packages
"$python" -m twine check --strict "$packages"/*
"$python" "$root/scripts/package_contents.py" "$packages"/*.whl "$packages"/*.tar.gz
example_runs
make_environment plain
quietly "$work/plain/bin/pip" install --no-deps "$packages"/*.whl
borrow plain
(wheel_runs)
extras_resolve
