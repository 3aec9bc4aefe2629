// The kernels of one instruction set; every .cpp of the set defines its own.
#pragma once

#include "kernels.h"

namespace fd {
namespace FD_ISA {

void noise(const FdNoiseArgs&);
void reverse_step(const FdStepArgs&);
void guidance_rescale(const FdRescaleArgs&);
void reparameterize(const FdReparameterizeArgs&);
void reparameterize_backward(const FdReparameterizeBackwardArgs&);
void film_norm(const FdFilmNormArgs&);
void modulate(const FdModulateArgs&);
void brownian(const FdBrownianArgs&);
void add_noise(const FdAddNoiseArgs&);
void dynamic_threshold(const FdThresholdArgs&);
bool torch_noise(const FdTorchNoiseArgs&);
bool brownian_tree(const FdTreeArgs&);

}  // namespace FD_ISA
}  // namespace fd
