// Compiled for another processor than the rest: see CMakeLists.txt.
#if defined(__AVX2__)

#include "dense_portable.h"

namespace moebius {
const DenseLevel* avx2_dense() { return &kPortableDense; }
}  // namespace moebius

#else

#include "dense.h"

namespace moebius {
const DenseLevel* avx2_dense() { return nullptr; }
}  // namespace moebius

#endif
