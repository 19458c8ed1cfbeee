// The search for trellis codes as Python hands it over.
#include "border.h"
#include "trellis.h"

namespace moebius {
namespace {

void search(const Array& values, const Array& scales, const Array& table, int rate, const Array& codes) {
  check("values", values, Kind::f32, {kAny, kAny});
  const int count = size_of("values", values, 0), length = size_of("values", values, 1);
  check("scales", scales, Kind::f32, {count, length});
  check("table", table, Kind::f32, {kTrellisStates});
  check("codes", codes, Kind::u8, {count, length});
  require(rate >= 1 && rate <= kMostTrellisRate, "rate: got " + std::to_string(rate) + " bits, wanted 1 to 4");
  if (length == 0) return;
  const TrellisSearch given{pointer<float>(values), pointer<float>(scales), pointer<float>(table), count, length,
                            pointer<uint8_t>(codes)};
  nb::gil_scoped_release unlocked;
  search_trellis(given, rate);
}

}  // namespace

void bind_trellis(nb::module_& m) {
  m.def("search_trellis", &search, nb::arg("values"), nb::arg("scales"), nb::arg("table"), nb::arg("rate"), nb::arg("codes"));
}

}  // namespace moebius
