#include "border.h"

#include <climits>

namespace moebius {
namespace {

nb::dlpack::dtype dtype_of(Kind kind) {
  const auto integer = static_cast<uint8_t>(nb::dlpack::dtype_code::Int),
             floating = static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
  switch (kind) {
    case Kind::f32: return {floating, 32, 1};
    case Kind::bf16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    case Kind::f16: return {floating, 16, 1};
    case Kind::i64: return {integer, 64, 1};
    case Kind::i32: return {integer, 32, 1};
    case Kind::i16: return {integer, 16, 1};
    case Kind::u8: break;
  }
  return {static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};
}

std::string name_of(nb::dlpack::dtype dtype) {
  const char* kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  return (dtype.code < 7 ? kinds[dtype.code] : "dtype") + std::to_string(dtype.bits);
}

template <typename Sizes>
std::string shape_of(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes)
    text += (text.size() > 1 ? ", " : "") + (size == kAny ? std::string("any") : std::to_string(size));
  return text + ")";
}

std::string described(const Array& array) {
  std::vector<int64_t> sizes, strides;
  for (size_t i = 0; i < array.ndim(); ++i)
    sizes.push_back(static_cast<int64_t>(array.shape(i))), strides.push_back(array.stride(i));
  const std::string where = array.device_type() == nb::device::cpu::value ? "" : ", not on the CPU";
  return name_of(array.dtype()) + " " + shape_of(sizes) + " with strides " + shape_of(strides) + where;
}

bool fits(const Array& array, std::initializer_list<int64_t> shape, size_t from) {
  if (array.device_type() != nb::device::cpu::value || array.ndim() != shape.size()) return false;
  const int64_t* wanted = shape.begin();
  bool empty = false;
  for (size_t i = 0; i < array.ndim(); ++i) {
    const auto size = static_cast<int64_t>(array.shape(i));
    if (wanted[i] != kAny && wanted[i] != size) return false;
    empty |= size == 0;
  }
  int64_t stride = 1;
  for (size_t i = array.ndim(); !empty && i-- > from;) {
    if (array.shape(i) != 1 && array.stride(i) != stride) return false;
    stride *= static_cast<int64_t>(array.shape(i));
  }
  return true;
}

[[noreturn]] void refuse(const char* name, const Array& array, const std::string& kind, std::initializer_list<int64_t> shape) {
  throw BorderError(std::string(name) + ": got " + described(array) + ", wanted contiguous " + kind + " " + shape_of(shape) +
                    " on the CPU");
}

}  // namespace

void check(const char* name, const Array& array, Kind kind, std::initializer_list<int64_t> shape, size_t from) {
  if (array.dtype() != dtype_of(kind) || !fits(array, shape, from)) refuse(name, array, name_of(dtype_of(kind)), shape);
}

bool check_floats(const char* name, const Array& array, std::initializer_list<int64_t> shape, size_t from) {
  const bool bf16 = array.dtype() == dtype_of(Kind::bf16);
  if ((!bf16 && array.dtype() != dtype_of(Kind::f32)) || !fits(array, shape, from))
    refuse(name, array, "float32 or bfloat16", shape);
  return bf16;
}

void require(bool good, const std::string& message) {
  if (!good) throw BorderError(message);
}

int size_of(const char* name, int64_t size) {
  require(size >= 0 && size <= INT_MAX,
          std::string(name) + ": got a size of " + std::to_string(size) + ", wanted 0 to " + std::to_string(INT_MAX));
  return static_cast<int>(size);
}

}  // namespace moebius
