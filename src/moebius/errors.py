"""Every error Moebius raises on purpose: one class per cause, all under :class:`MoebiusError`.

A message says where, what was got, what was wanted and what to do next. The command line prints it as one line.
"""


class MoebiusError(Exception):
    """Base of all errors that have a known cause. ``exit_code`` is what the command line returns for it."""

    exit_code = 2


class UnknownNameError(MoebiusError):
    """A method, option, format or data set name that no table knows."""


class RecipeError(MoebiusError):
    """A recipe that contradicts itself or asks for something impossible, such as 0 bits."""


class ModelNotFoundError(MoebiusError):
    """No checkpoint at the path or name given."""


class UnsupportedModelError(MoebiusError):
    """A model without fused experts, or with experts that Moebius does not know how to read."""


class CoverageError(MoebiusError):
    """Expert parameters that should have been quantized were not."""


class CheckpointError(MoebiusError):
    """A checkpoint that is incomplete, truncated, of the wrong shape, or holds NaN or Inf."""


class ShapeError(MoebiusError):
    """A tensor of another shape than the packed format or the layer asks for."""


class CalibrationError(MoebiusError):
    """A calibration text that is missing, empty or too short."""


class TaskError(MoebiusError):
    """An evaluation task that nobody defines, whose data cannot be loaded, or that runs code where it may not."""


class OutputError(MoebiusError):
    """An output folder that is not empty or cannot be written, or a disk that is full."""


class KernelError(MoebiusError):
    """A kernel that was asked for by name and is not there, or cannot run a layer."""


class ResourceError(MoebiusError):
    """Too little memory or disk for what was asked, or a process that was ended for want of it."""


# What a lack of memory is called by Python, C++, PyTorch, safetensors and the operating system.
_WANT_OF_MEMORY = (
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "bad_alloc",
    "unable to mmap",
    "can't start new thread",
    "failed to map segment",
)


def want_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that there is no memory left."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WANT_OF_MEMORY):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error of another library says, in one line; its class where it says nothing."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    said = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return said[:most]
