"""The methods: each composes the building blocks below into one way from expert matrices to packed ones."""

from moebius.methods.base import Method
from moebius.table import METHODS

__all__ = ["METHODS", "Method"]
