// Calls the C interface without the GIL, and raises its failures as exceptions of cumempool.errors.
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

// Returns the tag as a C string. Raises for a tag with a zero byte, which would end the string
// early and silently name another tag.
const char* tag_text(const std::string& tag);

// Runs a call of the C interface without the GIL, then raises its failure. No destructor takes the
// GIL back: if the interpreter has ended meanwhile, Python ends this thread there by unwinding it,
// and unwinding out of a destructor would abort the process.
template <typename Call>
void call(Call&& body) {
  PyThreadState* const state = PyEval_SaveThread();
  const cumempool_status status = std::forward<Call>(body)();
  PyEval_RestoreThread(state);
  check(status);
}

// Returns a number that stands for a resource of the C interface. If Python has no memory for the
// number, calls `give_back`, because no one else could.
template <typename GiveBack>
pybind11::int_ handed_out(std::uint64_t number, const GiveBack& give_back) {
  PyObject* const made = PyLong_FromUnsignedLongLong(number);
  if (made == nullptr) {
    give_back();
    throw pybind11::error_already_set();
  }
  return pybind11::reinterpret_steal<pybind11::int_>(made);
}

// Releases the GIL while it lives, so that work of a device that needs the GIL comes to an end. For
// destructors, and for deleters that torch calls with or without the GIL: they may wait, and cannot
// raise.
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
