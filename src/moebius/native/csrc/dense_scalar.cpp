#include "dense_portable.h"

namespace moebius {
const DenseLevel* scalar_dense() { return &kPortableDense; }
}  // namespace moebius
