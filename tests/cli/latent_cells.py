"""What the tests of the latent tools share: the cells of the pictures they write."""

import numpy as np

R = 16
CELL = 98  # R pixels enlarged 6 times and a line of 2
NAMES = ["end0", "end1", "z1", "z0"]


def cell(picture: np.ndarray, column: int, top: int = 0, left: int = 0) -> np.ndarray:
    """The image in a cell, at its own 16 x 16 pixels."""
    start = left + 2 + column * CELL
    return picture[top + 2 : top + 98 : 6, start : start + 96 : 6]


def label_width(picture: np.ndarray, columns: int) -> int:
    return picture.shape[1] - (columns * CELL + 2)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for values between two levels, which another batch may round the other way."""
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)
