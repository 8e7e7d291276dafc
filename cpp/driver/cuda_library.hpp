// libcuda, opened at run time: its functions by name, and why it could not be opened. Of the whole
// library only the cuda_* files include <cuda.h>; they take the headers of CUDA 11.8 and later.
#pragma once

#include <cuda.h>

#include "driver/error.hpp"

namespace cumempool::driver {

// cuda.h defines names such as cuMemGetInfo as macros for the current form (cuMemGetInfo_v2). So a
// member named by the macro has the type, and LINKAGE_NAME the name, of just that form.
struct Symbols {
#define CUMEMPOOL_SYMBOL(symbol, version, need) \
  decltype(&::symbol) symbol = nullptr;  // NOLINT(bugprone-macro-parentheses): a member's name
#include "driver/cuda_symbols.inc"
#undef CUMEMPOOL_SYMBOL
};

// Opens libcuda.so.1, never to close it, and looks its functions up. Throws Error
// (CUMEMPOOL_UNAVAILABLE) where there is none, or where one that is needed is missing.
Symbols open_libcuda();

// Throws Error (CUMEMPOOL_UNAVAILABLE) with advice where a first call to libcuda failed.
void require(CUresult result, const char* call);

}  // namespace cumempool::driver
