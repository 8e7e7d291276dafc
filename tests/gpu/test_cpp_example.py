"""The C++ example on the cuda driver, compiled against the files that the package installs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cumempool

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "cpp" / "sleep_wake.cpp"


def test_the_cpp_example_proves_what_it_says_on_a_gpu(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "no C++ compiler; building the package needed one too"
    library = Path(cumempool.get_library())
    program = tmp_path / "sleep_wake"
    places = [f"-I{cumempool.get_include()}", library, f"-Wl,-rpath,{library.parent}"]
    subprocess.run([compiler, "-std=c++17", SOURCE, *places, "-o", program], check=True)
    done = subprocess.run(
        [program, "cuda"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"cumempool {cumempool.__version__}, driver cuda\n")
    assert done.stdout.count("\nproven: ") == 5
