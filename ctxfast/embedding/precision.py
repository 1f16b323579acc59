# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts in fewer bits, for search indexes."""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
_WHO = "ctxfast.quantize_vectors"


def quantize_vectors(
    vectors: np.ndarray,
    precision: str,
    *,
    ranges: np.ndarray | None = None,
    calibration: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors of texts in 8 bits or one bit a number.

    Args:
        vectors: (N, D) float.
        precision: "int8" and "uint8": each column's range in 256 steps. "ubinary": a bit a number, 1 above zero, eight
            in a byte, the first the highest; "binary": the same less 128, as int8. "float32": as they are.
        ranges: (2, D), the lowest and the highest value of each column, for "int8" and "uint8". Texts that are compared
            with one another need the same ranges.
        calibration: (M, D) vectors to take ranges of. None, without ``ranges`` too: those of ``vectors``.

    Returns:
        (N, D) int8 or uint8, (N, ceil(D / 8)) for bits, or float32. A value outside of the ranges becomes the nearest.

    Raises:
        ValueError: a precision, a shape or a value that is not as said.

    Reference: sentence-transformers' quantize_embeddings.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"{_WHO}: precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(f"{_WHO}: vectors is {vectors.dtype} {vectors.shape}; expected floats (texts, dim).")
    given = [name for name, value in (("ranges", ranges), ("calibration", calibration)) if value is not None]
    if len(given) == 2 or (given and precision not in ("int8", "uint8")):
        raise ValueError(
            f"{_WHO}: {' and '.join(given)} given with precision {precision!r}; expected one of them, with 'int8' or "
            "'uint8'."
        )
    if precision == "float32":
        return vectors.astype(np.float32)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges is None and calibration is None and not len(vectors):
        return np.zeros(vectors.shape, precision)
    if ranges is None:
        source = vectors if calibration is None else np.asarray(calibration)
        if source.ndim != 2 or source.shape[1] != vectors.shape[1] or not len(source):
            raise ValueError(
                f"{_WHO}: {'vectors' if calibration is None else 'calibration'} has shape {source.shape}; expected "
                f"(texts, {vectors.shape[1]}) with at least one text, to take ranges of."
            )
        ranges = np.stack([source.min(0), source.max(0)])
    ranges = np.asarray(ranges)
    if ranges.shape != (2, vectors.shape[1]) or not (ranges[0] <= ranges[1]).all():
        raise ValueError(
            f"{_WHO}: ranges has shape {ranges.shape}; expected (2, {vectors.shape[1]}): lowest values, not above the "
            "highest."
        )
    steps = (ranges[1] - ranges[0]) / 255
    # A column that is the same everywhere has no range.
    whole = np.clip(np.floor((vectors - ranges[0]) / np.where(steps > 0, steps, 1)), 0, 255)
    return whole.astype(np.uint8) if precision == "uint8" else (whole - 128).astype(np.int8)
