// Failures of the C interface as exceptions of cumempool.errors, and calls of it without the GIL.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cumempool/cumempool.h"

namespace cumempool::python {

// Raises the calling thread's last failure unless `status` is OK.
void check(cumempool_status status);

// Raises an InvalidArgumentError.
[[noreturn]] void refuse(const char* message, const char* advice);

// A C string ends at its first zero byte, so such a tag would silently become another one.
const char* tag_text(const std::string& tag);

// Runs a call of the C interface without the GIL, then raises what it failed with. The GIL is not
// taken back by a destructor: where the interpreter has ended meanwhile, Python ends this thread
// there by unwinding it, and unwinding out of a destructor would abort the process.
template <typename Call>
void call(Call&& body) {
  PyThreadState* const state = PyEval_SaveThread();
  const cumempool_status status = std::forward<Call>(body)();
  PyEval_RestoreThread(state);
  check(status);
}

// A number for Python that stands for something the C interface has handed out. Where Python has no
// memory for it, `give_back` is called: nobody else could.
template <typename GiveBack>
pybind11::int_ handed_out(std::uint64_t number, const GiveBack& give_back) {
  PyObject* const made = PyLong_FromUnsignedLongLong(number);
  if (made == nullptr) {
    give_back();
    throw pybind11::error_already_set();
  }
  return pybind11::reinterpret_steal<pybind11::int_>(made);
}

// For what may wait where nothing can be raised: destructors, and deleters that torch calls with
// the GIL or without. While it lives the thread does not hold the GIL, so that work of a device
// that needs it comes to an end.
class Unlocked {
 public:
  Unlocked() noexcept;
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

}  // namespace cumempool::python
