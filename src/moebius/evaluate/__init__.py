"""What a quantized model lost: perplexity, divergence from the original, routing; and what it takes: bits, honestly counted."""

from moebius.callable_package import make_callable

make_callable(__name__)
