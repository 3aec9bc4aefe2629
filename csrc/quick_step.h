// `reverse_step` on the arguments that a sampling loop has, checked here rather than in Python: on
// a small latent those checks took as long as the step. What is not plainly in order is left to
// the caller, whose checks name the rule that was broken.
#pragma once

#include <cmath>

#include "cpu/kernels.h"
#include "tensor.h"

namespace fd {

// In the order of `fastdiff.table.Needs`.
struct Needs {
  bool output, uncond, variance, anchor, writes_anchor;
  int history;
  bool seeds;

  explicit Needs(const nanobind::tuple& t)
      : output(truth(t, 0)), uncond(truth(t, 1)), variance(truth(t, 2)), anchor(truth(t, 3)),
        writes_anchor(truth(t, 4)), history(nanobind::cast<int>(t[5])), seeds(truth(t, 6)) {}

 private:
  static bool truth(const nanobind::tuple& t, size_t i) { return PyObject_IsTrue(nanobind::object(t[i]).ptr()) == 1; }
};

struct QuickStep {
  nanobind::handle x, output, uncond, variance, y, history, seeds, guidance, clip, model_input;
};

class QuickCall {
 public:
  QuickCall(const TensorClass& tensors, const QuickStep& step) : tensors_(tensors), step_(step) {}

  // Fills `args` but for `out` where none was given; false: something is not plainly in order.
  bool check(const Needs& needs, FdStepArgs& args) {
    if (!tensors_.borrow(step_.x, &x_) || !x_.on_cpu() || x_.type() != kFloat32 || x_.ndim < 1)
      return false;
    order_ = x_.order();
    const int64_t count = x_.count();
    if (order_ == Order::kNone || count == 0) return false;
    args.x = reinterpret_cast<const float*>(x_.begin());
    args.samples = x_.shape[0];
    args.size = count / args.samples;
    args.channels = order_ == Order::kChannelsLast ? x_.shape[1] : 0;
    args.guidance_all = 1.0f;
    args.clip_all = -1.0f;
    written_[spans_++] = {x_.begin(), x_.begin() + x_.bytes()};
    return model_tensors(needs, args) && states(needs, args) && numbers(args);
  }

  // Where x' goes, a tensor that `check` has seen or a new one like x.
  bool check_out(nanobind::handle out, FdStepArgs& args) {
    Tensor t;
    if (!same(out, t) || t.type() != kFloat32 || !unread(t, true)) return false;
    args.out = reinterpret_cast<float*>(t.begin());
    const bool in_place = t.begin() == x_.begin();
    return in_place || apart(t);
  }

 private:
  struct Span {
    char *begin, *end;
  };

  // A tensor on the CPU with the shape and memory order of x.
  bool same(nanobind::handle object, Tensor& t) const {
    return tensors_.borrow(object, &t) && t.on_cpu() && t.shaped(x_) && t.has_order(order_);
  }

  // Shares no memory with what has been seen so far, and is seen from now on.
  bool apart(const Tensor& t) {
    char *begin = t.begin(), *end = begin + t.bytes();
    for (int i = 0; i < spans_; ++i)
      if (begin < written_[i].end && written_[i].begin < end) return false;
    written_[spans_++] = {begin, end};
    return true;
  }

  // Shares no memory with a model tensor, or is, where it may, the whole of one of its type.
  bool unread(const Tensor& t, bool whole) const {
    const char *begin = t.begin(), *end = begin + t.bytes();
    for (int i = 0; i < reads_; ++i) {
      if (whole && begin == read_[i].begin && end == read_[i].end) continue;
      if (begin < read_[i].end && read_[i].begin < end) return false;
    }
    return true;
  }

  bool model_tensor(nanobind::handle object, const void*& data, int64_t& stride, int& type) {
    Tensor t;
    if (!same(object, t) || t.type() < kFloat32 || (type >= 0 && t.type() != type)) return false;
    data = t.begin();
    stride = t.count() / t.shape[0];
    type = t.type();
    read_[reads_++] = {t.begin(), t.begin() + t.bytes()};
    return true;
  }

  bool model_tensors(const Needs& needs, FdStepArgs& args) {
    if (!needs.output) return true;
    int type = -1;
    if (!model_tensor(step_.output, args.output, args.output_stride, type)) return false;
    args.output_dtype = type;
    if ((needs.uncond || !step_.uncond.is_none()) &&
        !model_tensor(step_.uncond, args.uncond, args.uncond_stride, type))
      return false;
    return !needs.variance ||
           model_tensor(step_.variance, args.variance, args.variance_stride, type);
  }

  bool states(const Needs& needs, FdStepArgs& args) {
    Tensor t;
    if (needs.anchor || needs.writes_anchor) {
      if (!same(step_.y, t) || t.type() != kFloat32 || !apart(t) || !unread(t, false))
        return false;
      args.y = reinterpret_cast<float*>(t.begin());
    }
    if (needs.history) {
      if (!tensors_.borrow(step_.history, &t) || !t.on_cpu() || t.type() != kFloat32 ||
          !t.shaped(x_, 1) || t.shape[0] < needs.history ||
          !(t.strides[0] == x_.count() || t.shape[0] == 1) || !t.entry().has_order(order_) ||
          !apart(t) || !unread(t, false))
        return false;
      constexpr int kSlots = sizeof(args.history) / sizeof(args.history[0]);
      for (int k = 0; k < t.shape[0] && k < kSlots; ++k)
        args.history[k] = reinterpret_cast<float*>(t.begin()) + k * x_.count();
    }
    if (needs.seeds) {
      if (!tensors_.borrow(step_.seeds, &t) || !t.on_cpu() || t.type() != Tensor::kInt64 ||
          t.ndim != 1 || t.shape[0] != args.samples || !t.dense(false))
        return false;
      args.seeds = reinterpret_cast<const int64_t*>(t.begin());
    }
    if (!step_.model_input.is_none()) {
      if (!same(step_.model_input, t) || t.type() < kFloat32 || !apart(t) ||
          !unread(t, t.type() == args.output_dtype))
        return false;
      args.model_input = t.begin();
      args.model_input_dtype = t.type();
    }
    return true;
  }

  // Finite in float32 too; the weights of single samples are not for here.
  static bool number(nanobind::handle object, float& value) {
    double wide;
    if (!plain_number(object, wide)) return false;
    value = static_cast<float>(wide);
    return std::isfinite(value);
  }

  bool numbers(FdStepArgs& args) const {
    float w;
    if (!number(step_.guidance, w)) return false;
    if (args.uncond) args.guidance_all = w;
    if (step_.clip.is_none()) return true;
    return number(step_.clip, args.clip_all) && args.clip_all >= 0.0f;
  }

  const TensorClass& tensors_;
  const QuickStep& step_;
  Tensor x_;
  Order order_ = Order::kNone;
  Span written_[5];  // x, y, history, model_input, out
  Span read_[3];     // output, uncond, variance
  int spans_ = 0, reads_ = 0;
};

}  // namespace fd
