# Finds cuda.h, the one thing of CUDA that a build needs: in a toolkit where there is one, else in
# NVIDIA's header wheel (nvidia-cuda-runtime), which is a build requirement of the Python package.
# Defines CudaHeader::CudaHeader.
if(CudaHeader_IGNORED_TOOLKIT AND NOT CUMEMPOOL_IGNORE_CUDA_TOOLKIT
   OR NOT CudaHeader_IGNORED_TOOLKIT AND CUMEMPOOL_IGNORE_CUDA_TOOLKIT)
  unset(CudaHeader_INCLUDE_DIR CACHE)
endif()
set(CudaHeader_IGNORED_TOOLKIT "${CUMEMPOOL_IGNORE_CUDA_TOOLKIT}" CACHE INTERNAL "")

if(NOT CUMEMPOOL_IGNORE_CUDA_TOOLKIT)
  find_path(
    CudaHeader_INCLUDE_DIR cuda.h
    HINTS ENV CUDA_HOME ENV CUDA_PATH "${CUDAToolkit_ROOT}" ENV CUDAToolkit_ROOT
    PATHS /usr/local/cuda /opt/cuda
    PATH_SUFFIXES include targets/x86_64-linux/include targets/sbsa-linux/include)
endif()

if(NOT CudaHeader_INCLUDE_DIR)
  if(NOT Python_EXECUTABLE)
    find_package(Python COMPONENTS Interpreter QUIET)
  endif()
  if(Python_EXECUTABLE)
    # The folders nvidia/*/include of every place that Python imports from.
    execute_process(
      COMMAND
        "${Python_EXECUTABLE}" -c
        "import glob, sys; print(';'.join(d for p in sys.path for d in sorted(glob.glob(glob.escape(p or '.') + '/nvidia/*/include'), reverse=True)))"
      OUTPUT_VARIABLE header_wheels
      OUTPUT_STRIP_TRAILING_WHITESPACE)
    find_path(CudaHeader_INCLUDE_DIR cuda.h PATHS ${header_wheels} NO_DEFAULT_PATH)
  endif()
endif()

if(CudaHeader_INCLUDE_DIR)
  file(STRINGS "${CudaHeader_INCLUDE_DIR}/cuda.h" version_line REGEX "^#define CUDA_VERSION [0-9]+$")
  string(REGEX REPLACE "^#define CUDA_VERSION ([0-9]+)$" "\\1" CudaHeader_VERSION "${version_line}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  CudaHeader
  REQUIRED_VARS CudaHeader_INCLUDE_DIR
  VERSION_VAR CudaHeader_VERSION
  REASON_FAILURE_MESSAGE
    "cuda.h was not found. Set CUDA_HOME to a CUDA toolkit, or run: pip install nvidia-cuda-runtime")
mark_as_advanced(CudaHeader_INCLUDE_DIR)

if(CudaHeader_FOUND AND NOT TARGET CudaHeader::CudaHeader)
  add_library(CudaHeader::CudaHeader INTERFACE IMPORTED)
  target_include_directories(CudaHeader::CudaHeader SYSTEM
                             INTERFACE "${CudaHeader_INCLUDE_DIR}")
endif()
