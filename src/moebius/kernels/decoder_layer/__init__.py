"""A decoder layer for one new token of each text, in one call: what PyTorch would do in a hundred small ones."""

from moebius.kernels.decoder_layer.cpu import (
    DTYPES,
    Attention,
    DecoderLayer,
    GatedMlp,
    Matrix,
    RoutedExperts,
    SharedExpert,
    normalize,
)

__all__ = ["DTYPES", "Attention", "DecoderLayer", "GatedMlp", "Matrix", "RoutedExperts", "SharedExpert", "normalize"]
