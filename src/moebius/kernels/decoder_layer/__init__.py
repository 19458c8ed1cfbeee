"""A decoder layer for one new token of each text, in one call: what PyTorch would do in a hundred small ones."""

from moebius.kernels.decoder_layer.cpu import Attention, DecoderLayer, GatedMlp, Matrix, RoutedExperts, SharedExpert, normalize

__all__ = ["Attention", "DecoderLayer", "GatedMlp", "Matrix", "RoutedExperts", "SharedExpert", "normalize"]
