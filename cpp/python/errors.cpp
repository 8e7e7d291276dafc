// Calls the C interface without the GIL, and raises its failures as exceptions of cumempool.errors.
#include "errors.hpp"

#include <cxxabi.h>
#include <unistd.h>

#include "records.hpp"

namespace py = pybind11;

namespace cumempool::python {
namespace {

[[noreturn]] void raise(const cumempool_error& record) {
  const py::object error =
      py::module_::import("cumempool.errors").attr("error_from_fields")(fields_of(record));
  PyErr_SetObject(py::type::of(error).ptr(), error.ptr());
  throw py::error_already_set();
}

bool interpreter_ends() noexcept {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

}  // namespace

void check(cumempool_status status) {
  if (status != CUMEMPOOL_OK) raise(*cumempool_last_error());
}

void refuse(const char* message, const char* advice) {
  cumempool_error error{};
  error.status = CUMEMPOOL_INVALID_ARGUMENT;
  error.message = message;
  error.operation = error.tag = error.driver_call = error.result_name = "";
  error.advice = advice;
  error.device = -1;
  raise(error);
}

const char* tag_text(const std::string& tag) {
  if (tag.find('\0') != std::string::npos) {
    refuse("a tag cannot contain a zero byte", "use 1 to 255 bytes of UTF-8 without a zero byte");
  }
  return tag.c_str();
}

Unlocked::Unlocked() noexcept {
  if (!interpreter_ends() && PyGILState_Check() != 0) state_ = PyEval_SaveThread();
}

Unlocked::~Unlocked() {
  if (state_ == nullptr) return;
  try {
    PyEval_RestoreThread(state_);
  } catch (const abi::__forced_unwind&) {
    // The interpreter has ended meanwhile, and Python unwinds this thread to end it. That must not
    // leave a destructor, so the thread stays here, as it does from Python 3.14 on.
    for (;;) pause();
  }
}

}  // namespace cumempool::python
