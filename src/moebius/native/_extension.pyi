"""What C++ takes. Tensors are contiguous and on the CPU; another dtype or shape raises ShapeError."""

from collections.abc import Sequence

from torch import Tensor

#: Up to so many inputs of one matrix are read from its bits one by one; beyond, it is unpacked first.
FEW_INPUTS: int

class Level:
    """The loops of one set of instructions over integers, for tests."""

    def add_signs(self, signs: Tensor, values: Tensor, lanes: int, sums: Tensor) -> None: ...
    def dot_signs(self, signs: Tensor, values: Tensor, columns: int, sums: Tensor) -> None: ...
    def dot_codes(self, codes: Tensor, bits: int, values: Tensor, columns: int, sums: Tensor) -> None: ...
    def add_codes(
        self, codes: Tensor, bits: int, values: Tensor, columns: int, first: int, lanes: int, sums: Tensor
    ) -> None: ...

def levels() -> list[str]: ...
def level() -> str: ...
def use_level(name: str) -> None: ...
def loops(name: str) -> Level: ...
def has_tiles() -> bool: ...
def multiplies_bf16() -> bool: ...

class Factor:
    """A batch of packed matrices."""

    batch: int
    rows: int
    columns: int

    def apply(self, inputs: Tensor, outputs: Tensor, matrices: Tensor | None, inputs_per: int, threads: int) -> None:
        """Row ``i`` of the outputs, float32 (n * inputs_per, rows): matrix ``matrices[i]``, int64, or the first, times row
        ``i // inputs_per`` of the inputs, float32 (n, columns). Zeros where there is no such matrix."""

    def unpack(self, matrix: int, out: Tensor, threads: int) -> int:
        """One matrix, row after row as it is stored, to bfloat16; returns how many rows there are."""

def planes(
    input: bool, widths: Tensor, signs: Tensor, entry_scales: Tensor, direction_scales: Tensor, amplitudes: Tensor
) -> Factor:
    """:class:`moebius.formats.planes.Planes`: int16 (batch, planes), uint8 (rows, bytes), float32 (batch, entries), float32
    (batch, directions), float32 (8, 7)."""

def signs(
    columns: int,
    signs: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    picked: Tensor | None,
    salient_signs: Tensor | None,
    salient_scales: Tensor | None,
) -> Factor:
    """:class:`moebius.formats.signs.Signs` with float32 scales; picked: int32 (batch, salient)."""

def codes(input: bool, entries: int, grades: Sequence[tuple[int, int]], codes: Tensor, scales: Tensor) -> Factor:
    """One matrix of integers: runs of bits and directions, uint8 (bytes,), float32 (directions,)."""

class PackedLinear:
    """One matrix of integers of 4 or 8 bits: uint8 (rows, bytes), float16 (rows, groups)."""

    def __init__(self, columns: int, bits: int, group_size: int, codes: Tensor, scales: Tensor) -> None: ...
    def apply(self, inputs: Tensor, outputs: Tensor, threads: int) -> None:
        """(n, columns) to (n, rows), both float32 or both bfloat16."""

    def unpack(self, first: int, out: Tensor, threads: int) -> None:
        """Rows from ``first`` on to (count, columns), float32 or bfloat16."""

class Matrix:
    """A linear layer, packed or dense (float32 or bfloat16), with a float32 bias or none."""

    def __init__(self, packed: PackedLinear | None, weight: Tensor | None, bias: Tensor | None) -> None: ...
    def apply(self, inputs: Tensor, outputs: Tensor, threads: int) -> None: ...

class Experts:
    """Experts whose activation is SiLU of the first half of their channels times the second."""

    outputs: int

    def __init__(
        self,
        gate_up_right: Factor | None,
        gate_up: Factor,
        gate_up_left: Factor | None,
        down_right: Factor | None,
        down: Factor,
        down_left: Factor | None,
    ) -> None: ...
    def apply(self, inputs: Tensor, chosen: Tensor, weights: Tensor, outputs: Tensor, threads: int) -> None: ...

class DecoderLayer:
    """Attention, and a gated MLP or routed experts."""

    def __init__(
        self,
        attention_norm: Tensor,
        mlp_norm: Tensor,
        epsilon: float,
        query: Matrix,
        key: Matrix,
        value: Matrix,
        output: Matrix,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        heads: int,
        key_heads: int,
        width: int,
        scaling: float,
    ) -> None: ...
    def set_dense(self, gate: Matrix, up: Matrix, down: Matrix) -> None: ...
    def set_routed(self, router: Matrix, top_k: int, normalized: bool, experts: Experts) -> None: ...
    def set_shared(self, gate: Matrix, up: Matrix, down: Matrix, weigher: Matrix) -> None: ...
    def step(self, states: Tensor, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, threads: int) -> None: ...

def normalize(inputs: Tensor, weight: Tensor, epsilon: float, outputs: Tensor, threads: int) -> None: ...
def place_heads(
    states: Tensor,
    room: Tensor,
    norm: Tensor | None,
    epsilon: float,
    cosines: Tensor | None,
    sines: Tensor | None,
    threads: int,
) -> None: ...
def search_trellis(values: Tensor, scales: Tensor, table: Tensor, rate: int, codes: Tensor) -> None:
    """Codes, uint8 (n, length), whose levels in the table, float32 (256,), times the scales come nearest to the values."""

class Contents:
    """What flat uint8 tensors hold, as one number that any write changes."""

    def __init__(self, bytes: Sequence[Tensor]) -> None: ...
    def fingerprint(self) -> int: ...
