"""Runs at every start of Python, from the path file beside it: packed checkpoints open without ``import moebius``.

Only the standard library, and of that only what is imported by now: it puts one object on the list of module finders, and the
package itself is imported when transformers imports its configs or the table of its quantizers, whichever comes first.
``MOEBIUS_REGISTER=0`` turns it off.
"""

import os
import sys

_AWAITED = ("transformers.models.auto.configuration_auto", "transformers.quantizers.auto")


class RegisterWhenImported:
    """Finds nothing itself: it lets Moebius register before the first of these modules is looked for."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _AWAITED:
            return None
        sys.meta_path.remove(RegisterWhenImported)
        try:
            import moebius  # noqa: F401  puts its own finder first
        except Exception as error:  # transformers works as if Moebius were not there
            import warnings

            warnings.warn(f"moebius: cannot be imported, packed checkpoints will not load ({error})", stacklevel=2)
            return None
        from importlib.util import find_spec

        return find_spec(name)


if os.environ.get("MOEBIUS_REGISTER") != "0":
    sys.meta_path.insert(0, RegisterWhenImported)
