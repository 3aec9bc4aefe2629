// `film_norm` on tensors that are plainly in order; see quick_step.h.
#pragma once

#include "cpu/kernels.h"
#include "tensor.h"

namespace fd {

class FilmCall {
 public:
  explicit FilmCall(const TensorClass& tensors) : tensors_(tensors) {}

  // Fills the shape and the type from x, and the order that the other images must have.
  bool image(nanobind::handle object, int64_t groups, FdFilmNormArgs& args) {
    if (!float_tensor(tensors_, object, x_) || x_.ndim < 2) return false;
    order_ = x_.order();
    if (order_ == Order::kNone || x_.count() == 0) return false;
    args.x = x_.begin();
    args.dtype = x_.type();
    args.samples = x_.shape[0];
    args.channels = x_.shape[1];
    args.pixels = x_.count() / (args.samples * args.channels);
    args.channels_last = order_ == Order::kChannelsLast || args.pixels == 1;
    args.groups = groups;
    return groups >= 0 && (groups == 0 || args.channels % groups == 0);
  }

  // Where an image like x starts; null if it is not like x.
  void* like_x(nanobind::handle object) const {
    Tensor t;
    const bool ok = tensors_.borrow(object, &t) && t.on_cpu() && t.type() == x_.type() &&
                    t.shaped(x_) && t.has_order(order_);
    return ok ? t.begin() : nullptr;
  }

  // A tensor (C,), or (N, C) where `strides` is given; its type must be that of an earlier one.
  bool row(nanobind::handle object, const void*& data, int& type, int64_t* stride) const {
    if (object.is_none()) return true;
    Tensor t;
    if (!of_type(tensors_, object, t, type)) return false;
    const int axes = stride ? 2 : 1;
    if (t.ndim != axes || t.shape[axes - 1] != x_.shape[1]) return false;
    if (t.strides[axes - 1] != 1 && t.shape[axes - 1] != 1) return false;
    if (stride) {
      if (t.shape[0] != x_.shape[0]) return false;
      *stride = t.strides[0];
    }
    data = t.begin();
    return true;
  }

 private:
  const TensorClass& tensors_;
  Tensor x_;
  Order order_ = Order::kNone;
};

// None or "silu"
inline bool activation(nanobind::handle act, bool& silu) {
  silu = !act.is_none();
  return !silu || is_name(act, "silu");
}

}  // namespace fd
