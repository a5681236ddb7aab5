"""Forget and retain rows: known sets, splits, prompt formats, token ids, batches and samplers."""

from .clusters import TextClustering
from .collator import ForgetRetainCollator
from .dataset import HeldOut, forget_retain_dataset, hold_out
from .encoded import Encoded
from .encoder import RowEncoder
from .formats import MULTIPLE_CHOICE, QUESTION_ANSWER, REFUSALS, SENTIMENT, MultipleChoiceFormat, PromptFormat
from .known import load_known
from .known_reviews import load_four_splits
from .prompt_files import read_prompts
from .recognizers import SpacyRecognizer, TransformersRecognizer
from .splits import (
    Split,
    SplitReport,
    split_by_cluster,
    split_by_entity,
    split_by_predicate,
    split_by_source,
    subsample_forget,
    train_test,
)
from .streams import forget_retain_stream
from .unlearning_data import SPLITS, UnlearningData

__all__ = [
    "MULTIPLE_CHOICE",
    "QUESTION_ANSWER",
    "REFUSALS",
    "SENTIMENT",
    "SPLITS",
    "Encoded",
    "ForgetRetainCollator",
    "HeldOut",
    "MultipleChoiceFormat",
    "PromptFormat",
    "RowEncoder",
    "SpacyRecognizer",
    "Split",
    "SplitReport",
    "TextClustering",
    "TransformersRecognizer",
    "UnlearningData",
    "forget_retain_dataset",
    "forget_retain_stream",
    "hold_out",
    "load_four_splits",
    "load_known",
    "read_prompts",
    "split_by_cluster",
    "split_by_entity",
    "split_by_predicate",
    "split_by_source",
    "subsample_forget",
    "train_test",
]
