"""Whether numbers are finite, seen from their bits and without torch: NaN and infinity have every exponent bit set."""

from __future__ import annotations

# Type in safetensors' spelling → unsigned integer of its size, and the bits that are all set in what is not finite.
# (F8_E4M3 has no infinity, and its one NaN sets the mantissa too.)
_MARKS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
}


def finite(dtype: str, data: memoryview) -> bool:
    """Whether `data`, whole numbers of a type in safetensors' spelling, holds neither NaN nor infinity."""
    if dtype not in _MARKS or not data:
        return True
    import numpy as np

    kind, mark = _MARKS[dtype]
    words = np.frombuffer(data, dtype=kind)
    return not bool(((words & words.dtype.type(mark)) == mark).any())
