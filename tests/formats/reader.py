"""A reader of packed checkpoints that knows nothing but docs/format.md: numpy, json and struct."""

import json
import struct
from pathlib import Path

import numpy as np

TYPES = {"U8": "<u1", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "BF16": "<u2", "F32": "<f4"}


def tensors(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for name, about in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in about["data_offsets"])
            value = np.frombuffer(data[begin:end], TYPES[about["dtype"]]).reshape(about["shape"])
            yield name, (value.astype("<u4") << 16).view("<f4") if about["dtype"] == "BF16" else value


def stream(data, bits, count):
    found = np.unpackbits(data, axis=-1, bitorder="little")[..., : count * bits].reshape(*data.shape[:-1], count, bits)
    return (found.astype(np.int64) << np.arange(bits)).sum(-1)


def signs(data, count):
    return stream(data, 1, count) * 2.0 - 1


def scales(codes, grid):
    return np.exp(grid[..., :1].astype(np.float32) + grid[..., 1:].astype(np.float32) * codes)


def levels(codes, bits):
    return codes - (2**bits - 1) / 2


def dense(s, t):
    return t["values"].astype(np.float32)


def integers(s, t):
    group = np.arange(s["columns"]) // s["group_size"]
    q, groups = stream(t["codes"], s["bits"], s["columns"]), -(-s["columns"] // s["group_size"])
    middle = levels(0, s["bits"]) * -1
    if s["zero_points"]:
        middle = stream(t["zeros"], s["bits"], s["rows"] * groups).reshape(s["batch"], s["rows"], groups)[..., group]
    return column_scaled(s, t, t["scales"].astype(np.float32)[..., group] * (q - middle))


def column_scaled(s, t, matrices):
    return matrices * t["column_scales"].astype(np.float32)[:, None] if s.get("column_scaled") else matrices


def salient(s, t, count):
    """Which columns are salient, and their second signs in their places."""
    mask, second = np.zeros((s["batch"], s["columns"]), bool), np.zeros((s["batch"], s["rows"], s["columns"]))
    if s["salient"]:
        mask = stream(t["salient_mask"], 1, s["columns"]).astype(bool)
        for m in range(s["batch"]):
            second[m][:, mask[m]] = signs(t["salient_signs"][m], s["salient"])
    return mask, second


def signs_format(s, t):
    mask, second = salient(s, t, s["salient"])
    other = np.zeros((s["batch"], s["columns"]))
    if s["salient"]:
        other[mask] = t["salient_column_scales"].ravel()
    inner = signs(t["signs"], s["columns"]) * t["column_scales"][:, None].astype(np.float32) + second * other[:, None]
    return t["row_scales"].astype(np.float32)[..., None] * inner


def grouped_signs(s, t):
    mask, second = salient(s, t, s["salient"])
    first, j = signs(t["signs"], s["columns"]), np.arange(s["columns"])
    large = np.zeros(first.shape, int)
    for m in range(s["batch"]):
        large[m][:, ~mask[m]] = stream(t["groups"][m], 1, s["columns"] - s["salient"])
    columns = t["column_scales"].astype(np.float32) if s["column_scaled"] else np.ones((s["batch"], 2, s["columns"]))
    rows = t["row_scales"].astype(np.float32)[:, :, j // s["block"]]  # (batch, rows, columns, 2)
    plain = [rows[..., k] * columns[:, None, k] for k in (0, 1)]
    out = first * np.where(large, plain[1], plain[0])
    if s["salient"]:
        own = t["salient_row_scales"].astype(np.float32)[:, :, j // s["salient_block"]]
        both = [own[..., k] * columns[:, None, k] for k in (0, 1)]
        out = np.where(mask[:, None], first * both[0] + second * both[1], out)
    return out


def codebook(s, t):
    lines, along = (s["columns"], s["rows"]) if s.get("transposed") else (s["rows"], s["columns"])
    codes, books = stream(t["codes"], s["code_bits"], -(-along // s["length"])), t["codebooks"].astype(np.float32)
    out = np.stack([books[m][codes[m]].reshape(lines, -1)[:, :along] for m in range(s["batch"])])
    out = out.swapaxes(1, 2) if s.get("transposed") else out
    if s["rank"]:
        out = out + t["loadings"].astype(np.float32) @ t["directions"].astype(np.float32)
    out = out * t["row_scales"].astype(np.float32)[..., None] if s["row_scaled"] else out
    return column_scaled(s, t, out)


def graded(s, t):
    count, entries = (s["rows"], s["columns"]) if s["side"] == "input" else (s["columns"], s["rows"])
    factor, out, place, k = scales(t["scale_codes"], t["scale_grid"]), np.zeros((s["batch"], count, entries)), 0, 0
    for bits, number in (map(int, grade.split(":")) for grade in s["grades"].split()):
        for _ in range(number):
            width = -(-entries * bits // 8)
            codes = stream(t["codes"][:, place : place + width], bits, entries)
            out[:, k], place, k = factor[:, k, None] * levels(codes, bits), place + width, k + 1
    return out if s["side"] == "input" else out.swapaxes(1, 2)


DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
AMPLITUDES = [
    [float(word) for word in line.split("|")[2].split()]
    for line in DOCUMENT.splitlines()
    if line.startswith(tuple(f"| {planes} | " for planes in range(1, 8)))
]


def planes(s, t):
    count, entries = (s["columns"], s["rows"]) if s["side"] == "input" else (s["rows"], s["columns"])
    out, row, place, live = np.zeros((s["batch"], count, entries)), 0, 0, 0
    directions = stream(t["direction_codes"], s["scale_bits"], s["live"])
    for m, widths in enumerate(t["widths"].astype(int)):
        for p, width in enumerate(widths):
            for k in range(width):
                out[m, k] += AMPLITUDES[(widths > k).sum() - 1][p] * signs(t["signs"][row], entries)
                row += 1
        if first := widths[0]:
            out[m, :first] *= scales(directions[place : place + first], t["direction_grids"][live])[:, None]
            out[m] *= scales(stream(t["entry_codes"][live], s["scale_bits"], entries), t["entry_grids"][live])
            place, live = place + first, live + 1
    return out.swapaxes(1, 2) if s["side"] == "input" else out


def spectral(s, t):
    count, entries = (s["columns"], s["rows"]) if s["transposed"] else (s["rows"], s["columns"])
    group, place = np.arange(entries) // s["group_size"], 0
    out, widths = np.zeros((s["batch"], count, entries)), stream(t["widths"], 4, count)
    for bits in range(1, 9):
        for m, k in np.argwhere(widths == bits):
            codes = place + 2 * (group[-1] + 1)
            end = codes + -(-entries * bits // 8)
            factor = t["payload"][place:codes].copy().view("<f2").astype(np.float32)[group]
            out[m, k], place = factor * levels(stream(t["payload"][codes:end], bits, entries), bits), end
    out = out.swapaxes(1, 2) if s["transposed"] else out
    return out * t["row_scales"].astype(np.float32)[..., None] if s["row_scaled"] else out


LEVELS = [
    float(block.split()[1]) * np.frombuffer(bytes.fromhex("".join(block.split()[2:])), "i1")
    for block in DOCUMENT.split("```text")[-1].split("```")[0].split("rate ")[1:]
]


def trellis(s, t):
    out, row = np.zeros((s["batch"], s["columns"], s["rows"])), 0
    for m, rates in enumerate(stream(t["rates"], 4, s["columns"])):
        for j, rate in enumerate(rates):
            if rate:
                bits = stream(t["codes"][row : row + rate], 1, s["rows"])
                codes = (bits << np.arange(rate)[:, None]).sum(0)
                state = sum(np.roll(codes, back) << (rate * back) for back in range(8)) & 255
                out[m, j], row = LEVELS[rate - 1][state], row + rate
    rows, columns = scales(t["row_codes"], t["grids"][:, :2]), scales(t["column_codes"], t["grids"][:, 2:])
    return out.swapaxes(1, 2) * rows[..., None] * columns[:, None]


FORMATS = {f.__name__: f for f in (dense, integers, grouped_signs, codebook, graded, planes, spectral, trellis)} | {
    "signs": signs_format
}


def matrices(spec, stored, prefix):
    if "factor" not in spec:
        own = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        return FORMATS[spec["format"]](spec, own)
    part = {name: matrices(about, stored, f"{prefix}{name}.") for name, about in spec.items()}
    out = part["left"] @ part["factor"] if "left" in part else part["factor"]
    return out @ part["right"] if "right" in part else out


def read(folder):
    """Name of every parameter that is packed, and its matrices as (experts, out, in)."""
    stored = {name: value for path in sorted(Path(folder).glob("*.safetensors")) for name, value in tensors(path)}
    modules = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["modules"]
    return {module: matrices(spec, stored, f"{module}.") for module, spec in modules.items()}
