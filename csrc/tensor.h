// What a kernel needs to know of a torch.Tensor, read in about 30 ns and without linking torch:
// through the DLPack C exchange API, a table of functions that the class itself carries
// (`__dlpack_c_exchange_api__`). Its binary interface is that of DLPack 1.x, declared here.
#pragma once

#include <nanobind/nanobind.h>

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

// The class torch.Tensor with its exchange table; empty until `find` has found one.
class TensorClass {
 public:
  // A parameter is a tensor in all that a kernel reads: its class inherits the table.
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
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    if (!api_ || (type != type_ && type != parameter_)) return false;
    if (api_->borrow(object.ptr(), out) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  PyObject *type_ = nullptr, *parameter_ = nullptr;  // torch keeps its classes alive
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

}  // namespace fd
