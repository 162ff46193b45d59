// Any processor: 16-byte vectors, which are SSE2 on x86-64 and NEON on aarch64.
#include "kernels_begin.h"

namespace fastac {

#define FASTAC_VECTOR_BYTES 16
#define FASTAC_TILE_ROWS 4
#define FASTAC_TILE_VECTORS 2
#define FASTAC_DOT_TILE 3
#include "kernels.h"

const CpuKernels cpu::kBaselineKernels = {"baseline", run_forward, run_backward, run_softmax_weight_forward,
                                          run_softmax_weight_backward};

}  // namespace fastac
