// The Python module fastdiff._cpu. It links no torch: tensors arrive as addresses, which the
// callers in fastdiff/ops/_native.py have checked, so one build serves every torch version.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "modulate_call.h"
#include "quick_film.h"
#include "quick_step.h"

namespace nb = nanobind;

extern "C" const FdKernels fd_kernels_portable;
#ifdef FD_X86
extern "C" const FdKernels fd_kernels_avx2;
extern "C" const FdKernels fd_kernels_avx512;
extern "C" const FdKernels fd_kernels_avx512_bf16;
#endif

bool fd_forked = false;

namespace {

// Best first.
std::vector<const FdKernels*> supported() {
  std::vector<const FdKernels*> found;
#ifdef FD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&fd_kernels_avx512_bf16);
    found.push_back(&fd_kernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&fd_kernels_avx2);
#endif
  found.push_back(&fd_kernels_portable);
  return found;
}

const FdKernels* active = supported().front();

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const FdKernels* k : supported()) names.emplace_back(k->name);
  return names;
}

void set_isa(const std::string& name) {
  for (const FdKernels* k : supported()) {
    if (name == k->name) {
      active = k;
      return;
    }
  }
  throw nb::value_error(("this CPU has no instruction set '" + name + "'").c_str());
}

using Address = uint64_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

void noise(Address seeds, uint32_t step, uint32_t stream, int64_t samples, int64_t size,
           int64_t channels, Address out, int out_dtype) {
  const FdNoiseArgs args{at<int64_t>(seeds), step, stream, samples, size, channels,
                         at<void>(out), out_dtype};
  nb::gil_scoped_release release;
  active->noise(args);
}

void brownian(Address seeds, Address counters, Address weights, int64_t draws, uint32_t stream,
              Address x, float scale, int64_t samples, int64_t size, int64_t channels, Address out,
              int out_dtype) {
  const FdBrownianArgs args{at<int64_t>(seeds), at<int32_t>(counters), at<float>(weights), draws,
                            stream, at<float>(x), scale, samples, size, channels, at<void>(out),
                            out_dtype};
  nb::gil_scoped_release release;
  active->brownian(args);
}

void add_noise(Address x0, int dtype, Address alpha, Address sigma, Address seeds, uint32_t step,
               uint32_t stream, int64_t samples, int64_t size, int64_t channels, int target_kind,
               Address x, Address target) {
  const FdAddNoiseArgs args{at<void>(x0), dtype, at<float>(alpha), at<float>(sigma),
                            at<int64_t>(seeds), step, stream, samples, size, channels, target_kind,
                            at<void>(x), at<void>(target)};
  nb::gil_scoped_release release;
  active->add_noise(args);
}

void dynamic_threshold(Address x, int64_t samples, int64_t size, int64_t rank, double weight,
                       float most, Address quantile, Address out) {
  const FdThresholdArgs args{at<float>(x), samples, size, rank, weight, most,
                             at<float>(quantile), at<float>(out)};
  nb::gil_scoped_release release;
  active->dynamic_threshold(args);
}

bool torch_noise(Address state, Address out, int out_dtype, int64_t size) {
  const FdTorchNoiseArgs args{at<void>(state), at<void>(out), out_dtype, size};
  nb::gil_scoped_release release;
  return active->torch_noise(args);
}

bool brownian_tree(nb::bytes seeds, nb::bytes factors, nb::bytes moves, int64_t waiting, float sign,
                   float divisor, int64_t samples, int64_t size, Address out) {
  const FdTreeArgs args{static_cast<const uint32_t*>(seeds.data()),
                        static_cast<const float*>(factors.data()),
                        static_cast<const uint8_t*>(moves.data()),
                        static_cast<int64_t>(factors.size() / (3 * sizeof(float))),
                        static_cast<int64_t>(moves.size()), waiting, sign, divisor, samples, size,
                        at<float>(out)};
  nb::gil_scoped_release release;
  return active->brownian_tree(args);
}

void reverse_step(Address x, Address output, Address uncond, Address variance,
                  int64_t output_stride, int64_t uncond_stride, int64_t variance_stride,
                  int output_dtype, Address y, Address history, int64_t history_stride,
                  int history_slots, Address row_floats, Address row_ints, Address rows,
                  int64_t row, Address seeds, Address guidance, float guidance_all, Address scale,
                  Address clip, float clip_all, Address out, Address model_input, int model_input_dtype,
                  int64_t samples, int64_t size, int64_t channels) {
  FdStepArgs args{};
  args.x = at<float>(x);
  args.output = at<void>(output);
  args.uncond = at<void>(uncond);
  args.variance = at<void>(variance);
  args.output_stride = output_stride;
  args.uncond_stride = uncond_stride;
  args.variance_stride = variance_stride;
  args.output_dtype = output_dtype;
  args.y = at<float>(y);
  constexpr int kSlots = sizeof(args.history) / sizeof(args.history[0]);
  for (int k = 0; k < history_slots && k < kSlots; ++k)
    args.history[k] = at<float>(history) + k * history_stride;
  args.row_floats = at<float>(row_floats);
  args.row_ints = at<int32_t>(row_ints);
  args.rows = at<int64_t>(rows);
  args.row = row;
  args.seeds = at<int64_t>(seeds);
  args.guidance = at<float>(guidance);
  args.guidance_all = guidance_all;
  args.scale = at<float>(scale);
  args.clip = at<float>(clip);
  args.clip_all = clip_all;
  args.out = at<float>(out);
  args.model_input = at<void>(model_input);
  args.model_input_dtype = model_input_dtype;
  args.samples = samples;
  args.size = size;
  args.channels = channels;
  nb::gil_scoped_release release;
  active->reverse_step(args);
}

void guidance_rescale(Address output, Address uncond, int dtype, int64_t output_stride,
                      int64_t uncond_stride, int64_t samples, int64_t size, Address guidance,
                      Address phi, Address out) {
  const FdRescaleArgs args{at<void>(output), at<void>(uncond), dtype, output_stride, uncond_stride,
                           samples, size, at<float>(guidance), at<float>(phi), at<float>(out)};
  nb::gil_scoped_release release;
  active->guidance_rescale(args);
}

fd::TensorClass tensors;
PyObject* empty_like = nullptr;

// Hands over what is needed of torch; false: its tensors offer no exchange table.
bool use_torch(nb::handle tensor, nb::handle parameter, nb::handle like) {
  Py_XDECREF(empty_like);
  empty_like = nb::borrow(like).release().ptr();
  return tensors.find(tensor, parameter);
}

// x' where every argument is plainly in order, None where the caller has to look closer.
nb::object quick_step(nb::handle x, nb::handle output, nb::handle uncond, nb::handle variance,
                      nb::handle y, nb::handle history, nb::handle seeds, nb::handle guidance,
                      nb::handle clip, nb::object out, nb::handle model_input, Address row_floats,
                      Address row_ints, int64_t row, const nb::tuple& needs) {
  FdStepArgs args{};
  const fd::QuickStep step{x,       output, uncond,   variance, y,
                           history, seeds,  guidance, clip,     model_input};
  fd::QuickCall call(tensors, step);
  if (!call.check(fd::Needs(needs), args)) return nb::none();
  if (out.is_none()) out = nb::handle(empty_like)(x);
  if (!call.check_out(out, args)) return nb::none();
  args.row_floats = at<float>(row_floats);
  args.row_ints = at<int32_t>(row_ints);
  args.row = row;
  {
    nb::gil_scoped_release release;
    active->reverse_step(args);
  }
  return out;
}

// The result where every argument is plainly in order, None where the caller has to look closer.
nb::object film_norm(nb::handle x, int64_t groups, nb::handle weight, nb::handle bias,
                     nb::handle scale, nb::handle shift, nb::handle act, nb::handle residual,
                     nb::handle eps, bool plus_one, nb::object out) {
  FdFilmNormArgs args{};
  fd::FilmCall call(tensors);
  int weights = -1, films = -1;
  if (!call.image(x, groups, args) || !fd::activation(act, args.silu) ||
      !fd::plain_eps(eps, args.eps) ||
      !call.row(weight, args.weight, weights, nullptr) ||
      !call.row(bias, args.bias, weights, nullptr) ||
      !call.row(scale, args.scale, films, &args.scale_stride) ||
      !call.row(shift, args.shift, films, &args.shift_stride))
    return nb::none();
  args.weight_dtype = weights;
  args.film_dtype = films;
  args.plus_one = plus_one;
  if (!residual.is_none() && !(args.residual = call.like_x(residual))) return nb::none();
  if (out.is_none()) out = nb::handle(empty_like)(x);
  if (!(args.out = call.like_x(out))) return nb::none();
  {
    nb::gil_scoped_release release;
    active->film_norm(args);
  }
  return out;
}

// The results that are wanted in a tuple, or None where the caller has to look closer.
nb::object modulate(nb::handle x, nb::handle scale, nb::handle shift, nb::handle norm,
                    nb::handle weight, nb::handle bias, nb::handle residual, nb::handle gate,
                    nb::handle eps, bool modulated, nb::object out, nb::object total) {
  FdModulateArgs args{};
  fd::ModulateCall call(tensors, {x, scale, shift, norm, weight, bias, residual, gate, eps});
  if (!call.check(modulated, args)) return nb::none();
  if (modulated && out.is_none()) out = nb::handle(empty_like)(x);
  if (args.residual && total.is_none()) total = nb::handle(empty_like)(x);
  if (!call.check_results(out, total, args)) return nb::none();
  {
    nb::gil_scoped_release release;
    active->modulate(args);
  }
  if (!modulated) return nb::make_tuple(total);
  return args.residual ? nb::make_tuple(out, total) : nb::make_tuple(out);
}

void reparameterize(Address mu, Address logvar, int in_dtype, Address seeds, uint32_t step,
                    uint32_t stream, float low, float high, int64_t draws, int64_t samples,
                    int64_t size, Address z, Address kl) {
  const FdReparameterizeArgs args{at<void>(mu), at<void>(logvar), in_dtype, at<int64_t>(seeds),
                                  step, stream, low, high, draws, samples, size, at<void>(z),
                                  at<float>(kl)};
  nb::gil_scoped_release release;
  active->reparameterize(args);
}

void reparameterize_backward(Address grad_z, Address grad_kl, Address mu, Address logvar,
                             int in_dtype, Address seeds, uint32_t step, uint32_t stream,
                             float low, float high, int64_t draws, int64_t samples, int64_t size,
                             Address grad_mu, Address grad_logvar) {
  const FdReparameterizeBackwardArgs args{
      at<void>(grad_z), at<float>(grad_kl), at<void>(mu), at<void>(logvar), in_dtype,
      at<int64_t>(seeds), step, stream, low, high, draws, samples, size, at<void>(grad_mu),
      at<void>(grad_logvar)};
  nb::gil_scoped_release release;
  active->reparameterize_backward(args);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of fastdiff; use them through fastdiff.ops.";
  m.def("isas", &isas, "Instruction sets of this CPU that the build has, best first.");
  m.def("isa", [] { return active->name; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, "Use this instruction set from now on.");
  m.def("forked", [] { fd_forked = true; }, "Use one thread from now on; for a forked child.");
  m.def("noise", &noise);
  m.def("add_noise", &add_noise);
  m.def("brownian", &brownian);
  m.def("dynamic_threshold", &dynamic_threshold);
  m.def("reverse_step", &reverse_step);
  m.def("torch_noise", &torch_noise);
  m.def("brownian_tree", &brownian_tree);
  m.def("guidance_rescale", &guidance_rescale);
  m.def("use_torch", &use_torch);
  m.def("quick_step", &quick_step, nb::arg("x").none(), nb::arg("output").none(),
        nb::arg("uncond").none(), nb::arg("variance").none(), nb::arg("y").none(),
        nb::arg("history").none(), nb::arg("seeds").none(), nb::arg("guidance").none(),
        nb::arg("clip").none(), nb::arg("out").none(), nb::arg("model_input").none(),
        nb::arg("row_floats"), nb::arg("row_ints"), nb::arg("row"), nb::arg("needs"));
  m.def("film_norm", &film_norm, nb::arg("x"), nb::arg("groups"), nb::arg("weight").none(),
        nb::arg("bias").none(), nb::arg("scale").none(), nb::arg("shift").none(),
        nb::arg("act").none(), nb::arg("residual").none(), nb::arg("eps"), nb::arg("plus_one"),
        nb::arg("out").none());
  m.def("modulate", &modulate, nb::arg("x").none(), nb::arg("scale").none(),
        nb::arg("shift").none(), nb::arg("norm").none(), nb::arg("weight").none(),
        nb::arg("bias").none(), nb::arg("residual").none(), nb::arg("gate").none(),
        nb::arg("eps").none(), nb::arg("modulated"), nb::arg("out").none(),
        nb::arg("total").none());
  m.def("reparameterize", &reparameterize);
  m.def("reparameterize_backward", &reparameterize_backward);
}
