"""The methods: each composes the building blocks below into one way from expert matrices to packed ones."""

from moebius.methods.base import Method
from moebius.table import Table

METHODS = Table(
    "method",
    {
        "moebius": "moebius.methods.moebius:METHOD",
        "mobie": "moebius.methods.mobie:METHOD",
        "rtn": "moebius.methods.rtn:METHOD",
        "gptq": "moebius.methods.gptq:METHOD",
        "gptvq": "moebius.methods.kbvq:METHOD",
        "kbvq": "moebius.methods.kbvq:METHOD",
        "bitsmoe": "moebius.methods.bitsmoe:METHOD",
        "billm": "moebius.methods.billm:METHOD",
        "arb": "moebius.methods.arb:METHOD",
    },
)

__all__ = ["METHODS", "Method"]
