"""What is written down: atomic files, digests, `spul_config.json`, the model card."""

from .card import layers_card, model_card
from .digests import digest_of_rows, digest_of_tokenizer, fingerprint, summarize_rows
from .files import find_file, moved_in_whole, replacing
from .spul_config import DataSummary, SpulConfig, read_spul_config

__all__ = [
    "DataSummary",
    "SpulConfig",
    "digest_of_rows",
    "digest_of_tokenizer",
    "find_file",
    "fingerprint",
    "layers_card",
    "model_card",
    "moved_in_whole",
    "read_spul_config",
    "replacing",
    "summarize_rows",
]
