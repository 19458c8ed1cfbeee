// What tensors hold, as one number: any write changes it, whoever wrote and however.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moebius {

struct Bytes {
  const uint8_t* at;
  size_t count;
};

uint64_t fingerprint(const std::vector<Bytes>& parts);

}  // namespace moebius
