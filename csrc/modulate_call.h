// The arguments of `modulate`, checked here rather than in Python: on a few tokens the checks there
// take longer than the kernel. What is not plainly in order is left to the caller, whose checks
// name the rule that was broken.
#pragma once

#include "cpu/kernels.h"
#include "tensor.h"

namespace fd {

struct ModulateInputs {
  nanobind::handle x, scale, shift, norm, weight, bias, residual, gate, eps;
};

class ModulateCall {
 public:
  ModulateCall(const TensorClass& tensors, const ModulateInputs& in) : tensors_(tensors), in_(in) {}

  // Fills `args` but for the results; false: something is not plainly in order.
  bool check(bool modulated, FdModulateArgs& args) {
    if (!float_tensor(tensors_, in_.x, x_) || !x_.dense(false) ||
        (x_.ndim != 2 && x_.ndim != 3) || x_.count() == 0)
      return false;
    args.x = x_.begin();
    args.dtype = x_.type();
    args.samples = x_.shape[0];
    args.tokens = x_.ndim == 3 ? x_.shape[1] : 1;
    args.channels = x_.shape[x_.ndim - 1];
    int film = -1, affine = -1;
    if (!norm(args) || !channels(in_.scale, args.scale, film) ||
        !channels(in_.shift, args.shift, film) || !channels(in_.gate, args.gate, film) ||
        !vector(in_.weight, args.weight, affine) || !vector(in_.bias, args.bias, affine))
      return false;
    args.film_dtype = film;
    args.affine_dtype = affine;
    if (args.norm == kNoNorm && affine >= 0) return false;
    if (in_.residual.is_none()) return modulated && !args.gate.data;
    Tensor t;
    if (!like_x(in_.residual, t)) return false;
    args.residual = t.begin();
    return true;
  }

  // Where the results go: tensors like x, None where one is not wanted.
  bool check_results(nanobind::handle out, nanobind::handle total, FdModulateArgs& args) const {
    Tensor t;
    if (!out.is_none()) {
      if (!like_x(out, t)) return false;
      args.out = t.begin();
    }
    if (!total.is_none()) {
      if (!like_x(total, t)) return false;
      args.total = t.begin();
    }
    return true;
  }

 private:
  bool like_x(nanobind::handle object, Tensor& t) const {
    return tensors_.borrow(object, &t) && t.on_cpu() && t.type() == x_.type() && t.shaped(x_) &&
           t.dense(false);
  }

  // scale, shift or gate: (N, C) or the shape of x, the channels of a token side by side.
  bool channels(nanobind::handle object, FdChannels& c, int& type) const {
    if (object.is_none()) return true;
    Tensor t;
    if (!of_type(tensors_, object, t, type)) return false;
    const int last = t.ndim - 1, x_last = x_.ndim - 1;
    if (t.ndim != 2 && !t.shaped(x_)) return false;
    if (t.shape[0] != x_.shape[0] || t.shape[last] != x_.shape[x_last]) return false;
    if (t.shape[last] != 1 && t.strides[last] != 1) return false;
    c = {t.begin(), t.strides[0], t.ndim == 3 ? t.strides[1] : 0};
    return true;
  }

  bool vector(nanobind::handle object, const void*& data, int& type) const {
    if (object.is_none()) return true;
    Tensor t;
    if (!of_type(tensors_, object, t, type) || t.ndim != 1 || t.shape[0] != x_.shape[x_.ndim - 1] ||
        !t.dense(false))
      return false;
    data = t.begin();
    return true;
  }

  bool norm(FdModulateArgs& args) const {
    double eps;
    if (!plain_eps(in_.eps, eps)) return false;
    args.eps = static_cast<float>(eps);
    args.norm = is_name(in_.norm, "layer") ? kLayerNorm
                : is_name(in_.norm, "rms") ? kRmsNorm
                                           : kNoNorm;
    return args.norm != kNoNorm || in_.norm.is_none();
  }

  const TensorClass& tensors_;
  const ModulateInputs in_;
  Tensor x_;
};

}  // namespace fd
