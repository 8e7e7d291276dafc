// Opens libcuda at run time and looks its functions up. Only the cuda_* files of the library
// include <cuda.h>; they compile with the headers of CUDA 11.8 and later.
#pragma once

#include <cuda.h>

#include "driver/error.hpp"

namespace cumempool::driver {

// The functions of libcuda. cuda.h defines names such as cuMemGetInfo as macros for the current
// form (cuMemGetInfo_v2), so a member named by the macro has the type, and LINKAGE_NAME the name,
// of exactly that form.
struct Symbols {
#define CUMEMPOOL_SYMBOL(symbol, version, need) \
  decltype(&::symbol) symbol = nullptr;  // NOLINT(bugprone-macro-parentheses): a member's name
#include "driver/cuda_symbols.inc"
#undef CUMEMPOOL_SYMBOL
};

// Opens libcuda.so.1, which is never closed, and looks its functions up. Throws Error
// (CUMEMPOOL_UNAVAILABLE) if the library or a required function is missing.
Symbols open_libcuda();

// Throws Error (CUMEMPOOL_UNAVAILABLE) with advice if one of the first calls of libcuda failed.
void require(CUresult result, const char* call);

}  // namespace cumempool::driver
