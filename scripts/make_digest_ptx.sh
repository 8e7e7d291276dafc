#!/bin/sh
# Compiles cpp/driver/digest_kernel.cu to the PTX that the library carries, with clang 14 and
# without any part of CUDA. The result is committed, so that a build needs no compiler for GPUs.
#   make_digest_ptx.sh          writes cpp/driver/digest_kernel.ptx.inc
#   make_digest_ptx.sh --check  fails if the source compiles to something else than that file
# CLANG names the compiler; another version writes other, equally good PTX.
set -eu

driver=$(cd "$(dirname "$0")/../cpp/driver" && pwd)
committed=$driver/digest_kernel.ptx.inc
made=$(mktemp)
ptx=$(mktemp)
trap 'rm -f "$made" "$ptx"' EXIT

# Volta is the oldest GPU whose driver has all that the library needs; CUDA 10 takes PTX 6.3.
"${CLANG:-clang-14}" -x cuda --cuda-device-only -nocudainc -nocudalib -Wno-unknown-cuda-version \
  --cuda-gpu-arch=sm_70 -Xclang -target-feature -Xclang +ptx63 -std=c++17 -O3 -Wall -Wextra \
  -Werror -I "$driver/../../include" -S "$driver/digest_kernel.cu" -o "$ptx"

{
  echo "// Made from digest_kernel.cu by scripts/make_digest_ptx.sh; do not edit."
  echo 'R"ptx('
  sed -e '/^[[:space:]]*\/\//d' -e 's/[[:space:]]*$//' -e '/^$/d' "$ptx"
  echo ')ptx"'
} >"$made"

if [ "${1:-}" = "--check" ]; then
  if ! diff -u "$committed" "$made"; then
    echo "cpp/driver/digest_kernel.ptx.inc is out of date: run scripts/make_digest_ptx.sh" >&2
    exit 1
  fi
else
  cat "$made" >"$committed"
fi
