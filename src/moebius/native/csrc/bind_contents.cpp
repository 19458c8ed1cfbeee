// Tensors whose contents are looked at again and again: taken over once, so that a look costs no conversions.
#include "border.h"
#include "contents.h"

namespace moebius {
namespace {

class Contents {
 public:
  explicit Contents(std::vector<Array> arrays) : arrays_(std::move(arrays)) {
    for (const Array& array : arrays_) {
      check("contents", array, Kind::u8, {kAny});
      parts_.push_back({pointer<uint8_t>(array), array.size()});
    }
  }

  uint64_t fingerprint() const { return moebius::fingerprint(parts_); }

 private:
  std::vector<Array> arrays_;  // keeps their memory
  std::vector<Bytes> parts_;
};

}  // namespace

void bind_contents(nb::module_& m) {
  nb::class_<Contents>(m, "Contents")
      .def(nb::init<std::vector<Array>>(), nb::arg("bytes"))
      .def("fingerprint", &Contents::fingerprint);
}

}  // namespace moebius
