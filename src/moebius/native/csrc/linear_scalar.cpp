#include "linear_portable.h"

namespace moebius {

const LinearLevel* scalar_linear() {
  static const LinearLevel level{portable_arrange, portable_dot_bytes, portable_dot_nibbles, portable_expand_floats,
                                 portable_expand_bf16};
  return &level;
}

}  // namespace moebius
