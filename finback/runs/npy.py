"""numpy arrays as JSON text: base64 of .npy, as vLLM sends them. Does not import torch."""

import base64
import io

import numpy as np


def to_text(array: np.ndarray) -> str:
    """The text of an array, including its shape and dtype."""
    written = io.BytesIO()
    np.save(written, array)
    return base64.b64encode(written.getvalue()).decode("ascii")


def from_text(text: str) -> np.ndarray:
    """The array; ValueError for invalid text. Pickled code is never executed."""
    found: np.ndarray = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return found
