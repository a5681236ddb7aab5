"""Rows: what is to be forgotten, what is to be kept, and their token ids."""

from .dataset import forget_retain_dataset
from .encoding import Encoded, RowEncoder

__all__ = ["Encoded", "RowEncoder", "forget_retain_dataset"]
