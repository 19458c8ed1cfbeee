"""Weights to few bits, batched over experts: sign planes, integers, saliency and error feedback."""

from moebius.callable_package import make_callable

make_callable(__name__)
