"""numpy arrays as text, in JSON: base64 of .npy, as vLLM sends them. No torch here."""

import base64
import io

import numpy as np


def to_text(array: np.ndarray) -> str:
    """The text of an array, its shape and dtype included."""
    written = io.BytesIO()
    np.save(written, array)
    return base64.b64encode(written.getvalue()).decode("ascii")


def from_text(text: str) -> np.ndarray:
    """The array; ValueError where the text is none, and nothing in it is run."""
    found: np.ndarray = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return found
