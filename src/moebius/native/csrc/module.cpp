// What Python sees: moebius.native says how to call it.
#include "border.h"

NB_MODULE(_extension, m) {
  using namespace moebius;
  // Never released: errors may be raised as long as the interpreter lives.
  const nb::object errors = nb::module_::import_("moebius.errors");
  static PyObject* const shape_error = nb::object(errors.attr("ShapeError")).release().ptr();
  static PyObject* const checkpoint_error = nb::object(errors.attr("CheckpointError")).release().ptr();
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const BorderError& e) {
      PyErr_SetString(shape_error, e.what());
    } catch (const DamageError& e) {
      PyErr_SetString(checkpoint_error, e.what());
    }
  });
  bind_levels(m);
  bind_factors(m);
  bind_linear(m);
  bind_decoder(m);
  bind_contents(m);
  bind_trellis(m);
}
