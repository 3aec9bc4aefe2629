// What a kernel needs to know of a torch.Tensor, read in about 30 ns and without linking torch:
// through the DLPack C exchange API, a table of functions that the class itself carries
// (`__dlpack_c_exchange_api__`). Its binary interface is that of DLPack 1.x, declared here.
#pragma once

#include <nanobind/nanobind.h>

#include <cmath>
#include <cstdint>

#include "half.h"

namespace fd {

struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*borrow)(void* object, DlTensor* out);  // may be null
  void* current_stream;
};

// The classes whose objects are plain tensors, torch.Tensor and its Parameter, with the exchange
// table that they share; empty until `find` has found one.
class TensorClass {
 public:
  bool find(nanobind::handle type, nanobind::handle parameter) {
    api_ = nullptr;
    const nanobind::object capsule =
        nanobind::getattr(type, "__dlpack_c_exchange_api__", nanobind::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
    const auto* api = static_cast<const DlExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->major != 1 || !api->borrow) return false;
    type_ = type.ptr();
    parameter_ = parameter.ptr();
    api_ = api;
    return true;
  }

  // Fills `out` if the object is a plain tensor that DLPack can describe; sets no Python error.
  bool borrow(nanobind::handle object, DlTensor* out) const {
    const auto* type = reinterpret_cast<const PyObject*>(Py_TYPE(object.ptr()));
    if (!api_ || (type != type_ && type != parameter_)) return false;
    if (api_->borrow(object.ptr(), out) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  const PyObject* type_ = nullptr;  // torch keeps its classes alive
  const PyObject* parameter_ = nullptr;
  const DlExchangeApi* api_ = nullptr;
};

enum class Order { kNone, kContiguous, kChannelsLast };

// A tensor on the CPU.
struct Tensor : DlTensor {
  enum Type { kOther = -2, kInt64 = -1 };  // beside those of FdDtype

  bool on_cpu() const { return device_type == 1; }

  int type() const {
    if (type_lanes != 1) return kOther;
    if (type_code == 2 && type_bits == 32) return kFloat32;
    if (type_code == 4 && type_bits == 16) return kBFloat16;
    if (type_code == 2 && type_bits == 16) return kFloat16;
    if (type_code == 0 && type_bits == 64) return kInt64;
    return kOther;
  }

  char* begin() const { return static_cast<char*>(data) + byte_offset; }

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  int64_t bytes() const { return count() * (type_bits / 8); }

  // Axes of one entry may have any stride, as torch has it.
  bool dense(bool channels_last) const {
    int64_t expected = 1;
    const auto fits = [&](int axis) {
      const bool ok = shape[axis] == 1 || strides[axis] == expected;
      expected *= shape[axis];
      return ok;
    };
    if (channels_last && !fits(1)) return false;
    for (int i = ndim - 1; i >= 0; --i)
      if (!(channels_last && i == 1) && !fits(i)) return false;
    return true;
  }

  Order order() const {
    if (dense(false)) return Order::kContiguous;
    return (ndim == 4 || ndim == 5) && dense(true) ? Order::kChannelsLast : Order::kNone;
  }

  bool has_order(Order order) const { return dense(order == Order::kChannelsLast); }

  // The first entry along the first axis.
  Tensor entry() const {
    Tensor t = *this;
    t.ndim -= 1;
    t.shape += 1;
    t.strides += 1;
    return t;
  }

  // The same shape, after `skip` leading axes.
  bool shaped(const Tensor& other, int skip = 0) const {
    if (ndim - skip != other.ndim) return false;
    for (int i = 0; i < other.ndim; ++i)
      if (shape[skip + i] != other.shape[i]) return false;
    return true;
  }
};

// A tensor on the CPU of a type that kernels know.
inline bool float_tensor(const TensorClass& tensors, nanobind::handle object, Tensor& t) {
  return tensors.borrow(object, &t) && t.on_cpu() && t.type() >= kFloat32;
}

// The same, of that type where one was seen before, which is -1 until then.
inline bool of_type(const TensorClass& tensors, nanobind::handle object, Tensor& t, int& type) {
  if (!float_tensor(tensors, object, t) || (type >= 0 && t.type() != type)) return false;
  type = t.type();
  return true;
}

// The value of a plain float or int; false for whatever else a caller may pass as a number.
inline bool plain_number(nanobind::handle object, double& value) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  if (type != reinterpret_cast<PyObject*>(&PyFloat_Type) &&
      type != reinterpret_cast<PyObject*>(&PyLong_Type))
    return false;
  value = PyFloat_AsDouble(object.ptr());
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an int beyond float64
  return false;
}

// What is added to a variance: finite and not negative.
inline bool plain_eps(nanobind::handle object, double& value) {
  return plain_number(object, value) && std::isfinite(value) && value >= 0.0;
}

// Whether the object is this string.
inline bool is_name(nanobind::handle object, const char* name) {
  return PyUnicode_Check(object.ptr()) &&
         PyUnicode_CompareWithASCIIString(object.ptr(), name) == 0;
}

}  // namespace fd
