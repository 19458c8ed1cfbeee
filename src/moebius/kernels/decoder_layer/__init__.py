"""A decoder layer without what PyTorch would do in a hundred small steps: a token of each text in one call, several in few."""

from moebius.kernels.decoder_layer.cpu import (
    DTYPES,
    NOT_ON_CPU,
    Attention,
    DecoderLayer,
    GatedMlp,
    Matrix,
    RoutedExperts,
    SharedExpert,
    normalize,
    refusal,
    takes_prompts,
)
from moebius.kernels.decoder_layer.prompt import read

__all__ = [
    "DTYPES",
    "NOT_ON_CPU",
    "Attention",
    "DecoderLayer",
    "GatedMlp",
    "Matrix",
    "RoutedExperts",
    "SharedExpert",
    "normalize",
    "read",
    "refusal",
    "takes_prompts",
]
