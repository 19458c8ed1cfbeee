// Buffers that keep their memory from call to call, for the thread that calls.
#pragma once

#include <cstddef>
#include <vector>

namespace moebius {

// At least `count` elements of whatever was left there. Two that are in use at the same time have different places.
template <typename T, int kPlace = 0>
std::vector<T>& kept(size_t count) {
  static thread_local std::vector<T> buffer;
  if (buffer.size() < count) buffer.resize(count);
  return buffer;
}

}  // namespace moebius
