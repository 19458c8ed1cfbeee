"""Several recipes on one model: quantized, loaded and measured, one after the other, into one table and one figure."""

from moebius.callable_package import make_callable

make_callable(__name__)
