"""What packed bits mean. A format is a frozen set of tensors with a JSON-ready description; see :mod:`moebius.formats.base`."""

from moebius.formats.base import Packed, from_tensors
from moebius.formats.projection import PackedProjection

__all__ = ["Packed", "PackedProjection", "from_tensors"]
