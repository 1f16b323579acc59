// SPDX-License-Identifier: Apache-2.0
// Kernels as functions of ctxfast._C: a table of the members of a kernel's parameters, and nothing else to write.
//
//   const bind::Op op([](py::module_& m) {
//     bind::def(m, "scale_forward", &scale_forward,
//               {field<&P::numel>("numel"), field<&P::x>("x"), option<&P::threads>("threads")});
//   });
//
// Python gives the fields in the table's order, by name, or both. An `option` that is left out keeps the struct's own
// default. Pointers are addresses as integers, 0 for null; enumerations are strings; an array is a sequence of at most
// as many entries, the rest of it stays as it is. What does not fit the table is a TypeError, a string that names
// nothing a ValueError. The kernel runs without the GIL; kInvalidArgument is a ValueError, other codes a RuntimeError.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/common.h"
#include "base/isa.h"

struct CUstream_st;

namespace ctxfast::bind {

namespace py = pybind11;

// What a file binds. The module calls all of these when it is made.
class Op {
 public:
  using Define = void (*)(py::module_&);
  explicit Op(Define define) { all().push_back(define); }
  static std::vector<Define>& all() {
    static std::vector<Define> ops;
    return ops;
  }
};

inline void throw_unless_ok(const Status& status) {
  if (status.ok()) return;
  if (status.code == Code::kInvalidArgument) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

// Thrown by `set`: what a value should have been.
struct Unfit {
  std::string wanted;
  bool is_value = false;  // of the right type
};

// `set` puts a Python value into a member. A struct has its own, beside the table that needs it.
inline void set(PyObject* from, bool& to) {
  if (!PyBool_Check(from)) throw Unfit{"a bool"};
  to = from == Py_True;
}

inline void set(PyObject* from, int64_t& to) {
  to = PyLong_AsLongLong(from);
  if (to == -1 && PyErr_Occurred()) throw Unfit{"an integer of 64 bits"};
}

inline void set(PyObject* from, int32_t& to) {
  int64_t wide;
  set(from, wide);
  to = static_cast<int32_t>(wide);
  if (to != wide) throw Unfit{"an integer of 32 bits"};
}

inline void set(PyObject* from, float& to) {
  const double wide = PyFloat_AsDouble(from);
  if (wide == -1 && PyErr_Occurred()) throw Unfit{"a number"};
  to = static_cast<float>(wide);
}

template <class T>
void set(PyObject* from, T*& to) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(from);
  if (address == ~0ull && PyErr_Occurred()) throw Unfit{"an address"};
  to = reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

inline const char* text(PyObject* from) {
  const char* words = PyUnicode_Check(from) ? PyUnicode_AsUTF8(from) : nullptr;
  if (!words) throw Unfit{"a string"};
  return words;
}

// `names` of the values of an enumeration, which count from 0.
template <class Enum, size_t kCount>
void set_named(PyObject* from, const char* const (&names)[kCount], Enum& to) {
  const char* const given = text(from);
  std::string known;
  for (size_t i = 0; i < kCount; ++i) {
    if (std::strcmp(given, names[i]) == 0) return void(to = static_cast<Enum>(i));
  }
  for (const char* name : names) known += (known.empty() ? "'" : ", '") + std::string(name) + "'";
  throw Unfit{"one of " + known, true};
}

inline void set(PyObject* from, DType& to) { set_named(from, kDTypeNames, to); }

inline void set(PyObject* from, Isa& to) {
  if (find_isa(text(from), &to)) return;
  std::string known = "'auto'";
  for (const Isa isa : runnable_isas()) known += std::string(", '") + isa_name(isa) + "'";
  throw Unfit{known + ": what is compiled and this machine runs", true};
}

inline py::object entries(PyObject* from) {
  const auto list = py::reinterpret_steal<py::object>(PySequence_Fast(from, ""));
  if (!list) throw Unfit{"a sequence"};
  return list;
}

template <class T, size_t kMost>
void set(PyObject* from, T (&to)[kMost]) {
  const py::object list = entries(from);
  const size_t count = PySequence_Fast_GET_SIZE(list.ptr());
  if (count > kMost) throw Unfit{"at most " + std::to_string(kMost) + " entries", true};
  for (size_t i = 0; i < count; ++i) set(PySequence_Fast_GET_ITEM(list.ptr(), i), to[i]);
}

// A sequence of just these.
template <class... T>
void set_all(PyObject* from, T&... to) {
  const py::object list = entries(from);
  if (PySequence_Fast_GET_SIZE(list.ptr()) != sizeof...(T)) {
    throw Unfit{std::to_string(sizeof...(T)) + " entries", true};
  }
  PyObject** item = PySequence_Fast_ITEMS(list.ptr());
  (set(*item++, to), ...);
}

template <class P>
struct Arguments : P {
  CUstream_st* stream = nullptr;
};

template <class P>
struct Field {
  const char* name;
  void (*set)(Arguments<P>&, PyObject*);
  bool is_option = false;
};

template <class P>
using Fields = std::vector<Field<P>>;

template <class P, class M>
P owner(M P::*);

// A member of the parameters or, by several steps, of a struct in them.
template <auto kMember, auto... kInside>
Field<decltype(owner(kMember))> field(const char* name) {
  using P = decltype(owner(kMember));
  return {name, [](Arguments<P>& p, PyObject* from) { set(from, ((p.*kMember).*....*kInside)); }};
}

template <auto... kPath>
auto option(const char* name) {
  auto made = field<kPath...>(name);
  made.is_option = true;
  return made;
}

template <class P>
Fields<P> join(std::initializer_list<Fields<P>> parts) {
  Fields<P> all;
  for (const Fields<P>& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

template <class P, class Call>
class Function {
 public:
  // Never freed: Python's function points into it.
  static void add(py::module_& m, const char* name, Call call, Fields<P> fields) {
    auto* made = new Function{name, call, std::move(fields)};
    for (size_t i = 0; i < made->fields_.size(); ++i) {
      made->names_.push_back(PyUnicode_InternFromString(made->fields_[i].name));
      if (!made->fields_[i].is_option) made->needed_ |= uint64_t{1} << i;
    }
    const auto run = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Function::run));
    made->method_ = {name, run, METH_FASTCALL | METH_KEYWORDS, nullptr};
    m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&made->method_, py::capsule(made).ptr())));
  }

 private:
  Function(const char* name, Call call, Fields<P> fields) : name_(name), call_(call), fields_(std::move(fields)) {}

  static PyObject* run(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
    try {
      const auto& function = *static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
      Arguments<P> arguments;
      function.read(given, static_cast<size_t>(count), names, &arguments);
      return function.call(arguments);
    } catch (py::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  void read(PyObject* const* given, size_t count, PyObject* names, Arguments<P>* to) const {
    const size_t all = count + (names ? PyTuple_GET_SIZE(names) : 0);
    if (all > fields_.size()) {
      throw fault("takes at most " + std::to_string(fields_.size()) + " arguments, not " + std::to_string(all));
    }
    uint64_t seen = 0;
    for (size_t i = 0; i < all; ++i) {
      const size_t at = i < count ? i : place(PyTuple_GET_ITEM(names, i - count), i);
      if (seen >> at & 1) throw fault("got " + std::string(fields_[at].name) + " twice");
      seen |= uint64_t{1} << at;
      try {
        fields_[at].set(*to, given[i]);
      } catch (const Unfit& unfit) {
        refuse(fields_[at].name, given[i], unfit);
      }
    }
    const uint64_t missing = needed_ & ~seen;
    if (!missing) return;
    std::string list;
    for (size_t i = 0; i < fields_.size(); ++i) {
      if (missing >> i & 1) list += (list.empty() ? "" : ", ") + std::string(fields_[i].name);
    }
    throw fault("lacks " + list);
  }

  // The row of a name, which is most often the one where its value stands.
  size_t place(PyObject* name, size_t expected) const {
    if (names_[expected] == name) return expected;
    for (size_t i = 0; i < names_.size(); ++i) {
      if (names_[i] == name || PyUnicode_Compare(names_[i], name) == 0) return i;
    }
    throw fault("has no argument " + std::string(py::str(name)));
  }

  PyObject* call(const Arguments<P>& arguments) const {
    const auto run = [&] {
      const py::gil_scoped_release release;
      if constexpr (std::is_invocable_v<Call, const P&>) {
        return call_(arguments);
      } else {
        return call_(arguments, arguments.stream);
      }
    };
    if constexpr (std::is_same_v<decltype(run()), Status>) {
      throw_unless_ok(run());
      Py_RETURN_NONE;
    } else {
      return PyLong_FromLongLong(run());
    }
  }

  py::type_error fault(const std::string& what) const { return py::type_error("ctxfast._C." + name_ + " " + what); }

  [[noreturn]] void refuse(const char* field, PyObject* value, const Unfit& unfit) const {
    PyErr_Clear();
    const std::string got = py::repr(value).template cast<std::string>();
    const std::string words = "ctxfast._C." + name_ + ": " + field + " is " + got + "; expected " + unfit.wanted + ".";
    if (unfit.is_value) throw py::value_error(words);
    throw py::type_error(words);
  }

  std::string name_;
  Call call_;
  Fields<P> fields_;
  std::vector<PyObject*> names_;
  uint64_t needed_ = 0;  // a bit for each field that is no option; 64 fields at most
  PyMethodDef method_ = {};
};

// m.<name>(fields) -> None, or the integer that the call returns.
template <class P, class R>
void def(py::module_& m, const char* name, R (*call)(const P&), Fields<P> fields) {
  Function<P, R (*)(const P&)>::add(m, name, call, std::move(fields));
}

// The same with a CUDA stream's address as last field.
template <class P>
void def(py::module_& m, const char* name, Status (*call)(const P&, CUstream_st*), Fields<P> fields) {
  fields.push_back({"stream", [](Arguments<P>& p, PyObject* from) { set(from, p.stream); }});
  Function<P, Status (*)(const P&, CUstream_st*)>::add(m, name, call, std::move(fields));
}

}  // namespace ctxfast::bind
