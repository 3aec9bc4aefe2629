#include "table.h"

#define FD_NAME_OF(isa) #isa
#define FD_NAME(isa) FD_NAME_OF(isa)
#define FD_SYMBOL_OF(isa) fd_kernels_##isa
#define FD_SYMBOL(isa) FD_SYMBOL_OF(isa)

extern "C" const FdKernels FD_SYMBOL(FD_ISA);
const FdKernels FD_SYMBOL(FD_ISA) = {FD_NAME(FD_ISA), fd::FD_ISA::noise, fd::FD_ISA::reverse_step,
                                     fd::FD_ISA::guidance_rescale,
                                     fd::FD_ISA::reparameterize,
                                     fd::FD_ISA::reparameterize_backward,
                                     fd::FD_ISA::film_norm,
                                     fd::FD_ISA::modulate,
                                     fd::FD_ISA::brownian,
                                     fd::FD_ISA::add_noise,
                                     fd::FD_ISA::dynamic_threshold,
                                     fd::FD_ISA::torch_noise,
                                     fd::FD_ISA::brownian_tree};
