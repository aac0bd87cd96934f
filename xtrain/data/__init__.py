"""Data: text or tokens as an endless, addressed stream of batches (docs/data.md)."""

from xtrain.data.dataset import Dataset, open_data
from xtrain.data.sources import TokenStream

__all__ = ["Dataset", "TokenStream", "open_data"]
