// What comes from Python: tensors whose dtype, shape, layout and device are checked before anything is read or written.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "level.h"

namespace moebius {

namespace nb = nanobind;
using Array = nb::ndarray<>;
using OptionalArray = std::optional<Array>;

// A tensor of another kind than is wanted: moebius.errors.ShapeError.
struct BorderError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
// A tensor of the right kind whose numbers would lead outside: moebius.errors.CheckpointError.
struct DamageError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// What a tensor may hold. bf16 and fp16 are their bits here.
enum class Kind { f32, bf16, f16, i64, i32, i16, u8 };
constexpr int64_t kAny = -1;

// Throws unless the tensor is of this kind and shape (kAny: any size) on the CPU, and contiguous from dimension `from` on.
void check(const char* name, const Array& array, Kind kind, std::initializer_list<int64_t> shape, size_t from = 0);
// Whether it is bf16; throws unless it is that or float32.
bool check_floats(const char* name, const Array& array, std::initializer_list<int64_t> shape, size_t from = 0);
// Throws unless `good`.
void require(bool good, const std::string& message);
// A size as the loops count it.
int size_of(const char* name, int64_t size);
inline int size_of(const char* name, const Array& array, size_t dimension) {
  return size_of(name, static_cast<int64_t>(array.shape(dimension)));
}

template <typename T>
T* pointer(const Array& array) {
  return static_cast<T*>(array.data());
}
template <typename T>
T* pointer(const OptionalArray& array) {
  return array ? pointer<T>(*array) : nullptr;
}

// The set of instructions in use.
const Level& current_level();

void bind_levels(nb::module_& m);
void bind_factors(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_contents(nb::module_& m);
void bind_trellis(nb::module_& m);

}  // namespace moebius
