"""The methods: each composes the building blocks below into one way from expert matrices to packed ones."""

from moebius.methods.base import Method
from moebius.table import Table

METHODS = Table(
    "method",
    {
        "mobie": "moebius.methods.mobie:METHOD",
        "rtn": "moebius.methods.rtn:METHOD",
        "gptq": "moebius.methods.gptq:METHOD",
    },
)

__all__ = ["METHODS", "Method"]
