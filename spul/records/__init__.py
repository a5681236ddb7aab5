"""Records on disk: atomic files, digests, `spul_config.json`, model cards, templates, the ledger of requests."""

from .card import layers_card, model_card, write_metrics
from .digests import (
    DataSummary,
    DigestKey,
    RewrittenRows,
    digest,
    digest_of_parameters,
    digest_of_rows,
    digest_of_tokenizer,
    fingerprint,
    is_summary_of,
    make_digest_key,
    read_digest_key,
    summarize_rows,
)
from .files import atomic_folder, atomic_write, find_file, write_text
from .ledger import Ledger
from .ledger_events import EVENTS, LedgerEntry, LedgerEvent
from .ledger_follower import LedgerFollower
from .ledger_lines import LedgerFault
from .ledger_states import Occurrence, RequestState
from .spul_config import SpulConfig, read_spul_config

__all__ = [
    "EVENTS",
    "DataSummary",
    "DigestKey",
    "Ledger",
    "LedgerEntry",
    "LedgerEvent",
    "LedgerFault",
    "LedgerFollower",
    "Occurrence",
    "RequestState",
    "RewrittenRows",
    "SpulConfig",
    "atomic_folder",
    "atomic_write",
    "digest",
    "digest_of_parameters",
    "digest_of_rows",
    "digest_of_tokenizer",
    "find_file",
    "fingerprint",
    "is_summary_of",
    "layers_card",
    "make_digest_key",
    "model_card",
    "read_digest_key",
    "read_spul_config",
    "summarize_rows",
    "write_metrics",
    "write_text",
]
