// Compiled for another processor than the rest: see CMakeLists.txt.
#if defined(__AVX512F__)

#include "dense_portable.h"

namespace moebius {
const DenseLevel* avx512_dense() { return &kPortableDense; }
}  // namespace moebius

#else

#include "dense.h"

namespace moebius {
const DenseLevel* avx512_dense() { return nullptr; }
}  // namespace moebius

#endif
