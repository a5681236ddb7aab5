"""Tokenizers and rows for tests of the encoder."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PROMPT = "### text: good film\n### sentiment:"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_level(*words: str, **kwargs: str) -> PreTrainedTokenizerFast:
    """One id per word: <unk> 0, <s> 1, </s> 2, then the words given."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**SPECIAL, **kwargs})


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Put special tokens around every text, as in "<s> $A </s>"."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def sentencepiece_like(by: str = "normalizer") -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is a "▁", and every text gets one in front, whether it has one already or not."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(["sentiment: positive"] * 3 + ["the film : positive negative"] * 3, trainer)
    if by == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def row(prompt: str, completion: str, **columns: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, **columns}


def talk(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
