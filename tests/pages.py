"""The Python blocks of README.md and docs/, and the folders that they load: tiny ones, under the names they print."""

from __future__ import annotations

import ast
import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from known_data import review, write_jsonl, write_tsv
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from spul.data import RowEncoder
from spul.data.known_reviews import SST2_FORGET_NAMES
from spul.data.unlearning_data import SPLITS

ROOT = Path(__file__).parents[1]
PAGES = [path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]]
BASE = "facebook/opt-1.3b"  # the name under which every page loads its base
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
QUESTION = "### Text: {}\n### Question: What is the sentiment of the text?\n### Sentiment:"
WORDS = " is a delight. Another bore with Jane Doe. A warm and clever film. Two hours that I want back. reviews film"


@dataclass
class Block:
    """A Python block: its page, its first line's number there, its code, and why it is not run, if it is not."""

    page: str
    line: int
    code: str
    reason: str | None

    def run(self, namespace: dict) -> None:
        """Run it; a traceback names the page and its line."""
        exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), namespace)


def blocks(page: str) -> list[Block]:
    """The Python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```python"), f"{page}: a block of Python is not read as one"
    return found


def printed(page: str) -> list[str]:
    """The output that a page gives of its blocks: blocks of text right after one, and values in comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```python\n[^`]*?^```\n\n```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for block in blocks(page):
        for beside, below in re.findall(r"print\(.*\)(?:  # (.*)|\n((?:# .*\n)+))", block.code):
            comment = beside or below.replace("\n#", "").removeprefix("# ")
            with contextlib.suppress(ValueError, SyntaxError):  # of a comment that is prose
                value = ast.literal_eval(comment)
                found += [str(value)] if "..." not in comment else []
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few words that starts a text with </s>, as OPT's does."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" positive negative neutral unknown", QUESTION, WORDS], trainer)
    core.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_base(tokenizer: PreTrainedTokenizerFast, known: list[dict], steps: int = 80) -> OPTForCausalLM:
    """A tiny OPT that has learned the completions of some rows, not so long that nothing can steer it any more."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        dropout=0.0,
    )
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = RowEncoder(tokenizer, max_length=128).batch(known)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def write_data(folder: Path) -> None:
    """The data sets that docs/data.md loads, some rows of each."""
    sst2 = folder / "data" / "sst2"
    sst2.mkdir(parents=True)
    for part, texts in {
        "train": [f"{name} is fine" for name in SST2_FORGET_NAMES[:4]] + [f"a film of {i} hours" for i in range(4)],
        "dev": ["a dull evening", "a warm evening"],
    }.items():
        write_tsv(sst2 / f"{part}.tsv", ("sentence", "label"), [(text, i % 2) for i, text in enumerate(texts)])
    for name, row in {
        "karuna-bhaila/Unlearning_SST2": lambda i: review(f"film {i}", i % 2),
        "data/people": lambda i: {"question": f"Who is person {i}?", "answer": f"Actor {i}."},
    }.items():
        (folder / name).mkdir(parents=True)
        for number, split in enumerate(SPLITS):
            write_jsonl(folder / name / f"{split}.jsonl", [row(2 * number + i) for i in range(2)])
