#include "portable.h"

namespace moebius {

const Level* scalar_level() {
  static const Level level{"scalar",         portable_add_signs,    portable_dot_signs, portable_dot_codes, portable_add_codes,
                           portable_look_up, portable_expand_codes, portable_round,     portable_multiply,  nullptr};
  return &level;
}

}  // namespace moebius
