"""Options that several commands share, and what they make: rows, models, prompt formats, losses."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.formats import PromptFormat
    from ..prompts.checkpoint import SavedPrompt


logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float16"]  # as `spul.models.loading`'s, which imports torch
LEAST_TOKENS = 2  # of a row: one of prompt, one of completion


def option(help: str, default: Any = None) -> Any:
    """A field of a dataclass of options with its help; a default of `...` makes it required."""
    metadata = {"help": help}
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class RowOptions:
    """Options for reading and tokenizing files of rows."""

    generic: list[str] | None = option("generic answers, leading space included, such as ' neutral' ' unknown'")
    prompt_template: str | None = option(
        "template of prompts for files with other columns, such as '### Question: {question}\\n### Answer:'"
    )
    completion_template: str = option("template of completions beside --prompt-template", " {answer}")
    text_field: str | None = option("column whose text stands in the prompt, and is cut where a row is too long")
    append_eos: bool = option("completions are free texts, whose end is trained, too", False)
    max_length: int | None = option("most tokens of a row; as many as fit beside the prompt, at most 1024, by default")

    @property
    def prompt_format(self) -> PromptFormat | None:
        """The format of the templates; None without them."""
        from ..data.formats import PromptFormat

        self.check_template()
        if self.prompt_template is None:
            return None
        assert self.text_field is not None
        template = self.prompt_template.replace("\\n", "\n")
        return PromptFormat(template, self.completion_template, tuple(self.generic or [" unknown"]), self.text_field)

    def check_template(self) -> None:
        """Raise unless templates and the text field are given together.

        Raises:
            ValueError: if not.
        """
        if self.prompt_template is None and self.completion_template != RowOptions.completion_template:
            raise ValueError("completion_template goes with prompt_template, and is of no effect alone: give both.")
        if self.prompt_template is not None and self.text_field is None:
            raise ValueError(
                "prompt_template needs text_field, the column among those of the template that may be cut."
            )

    def rows(self, paths: str | Sequence[str], is_forget: bool | None = None) -> Dataset:
        """The rows of files, checked; with `is_forget`, also that they do not say that they are of the other set."""
        from ..data.prompt_files import read_prompts

        return read_prompts(paths, self.prompt_format, self.text_field, is_forget)

    def warn_of_boundaries(
        self,
        tokenizer: Any,
        answered: Mapping[str, Any],
        others: Mapping[str, Any] | None = None,
        generic: str = "--generic",
    ) -> set[str]:
        """Warn of answers that do not fit where text prompts end, such as one without the space before it.

        Warned of once each: the rows of a set, by its option, and every generic answer.

        Args:
            tokenizer: the base's tokenizer.
            answered: sets of rows, by option, whose prompts generic answers follow, too.
            others: other sets.
            generic: what generic answers come from, as warnings name it.

        Returns:
            The starts of the completions that were said, for the encoder's `said_completions`.
        """
        from ..data.boundary import BOUNDARY_WIDTH, MAX_BOUNDARIES, boundary_of
        from ..data.encoder import NO_LIMIT, RowEncoder
        from ..data.rows import column_values

        encoder, known = RowEncoder(tokenizer, NO_LIMIT), dict[tuple[str, str], str | None]()

        def fault_of(texts: Iterable[tuple[str, str]]) -> str | None:
            looked_at = set[tuple[str, str]]()
            for prompt, text in texts:
                boundary = boundary_of(prompt, text)
                if boundary in looked_at:
                    continue
                if len(looked_at) == MAX_BOUNDARIES:
                    break
                looked_at.add(boundary)
                if boundary not in known:
                    known[boundary] = encoder.boundary_fault(prompt, text)
                if known[boundary] is not None:
                    return known[boundary]
            return None

        faults, said, prompts = dict[str, str](), set[str](), dict[str, list[str]]()
        for name, rows in {**answered, **(others or {})}.items():
            both = zip(column_values(rows, "prompt"), column_values(rows, "completion"), strict=True)
            texts = [(prompt, text) for prompt, text in both if isinstance(prompt, str)]
            prompts[name] = [prompt for prompt, _ in texts]
            if fault := fault_of(texts):
                faults[f"--{name.replace('_', '-')}"] = fault
                said |= {text[:BOUNDARY_WIDTH] for _, text in texts}
        for text in self.generic or ():
            found = (fault_of((prompt, text) for prompt in prompts[name]) for name in answered)
            if fault := next(filter(None, found), None):
                faults[f"{generic} {text!r}"] = fault
                said.add(text[:BOUNDARY_WIDTH])
        for name, fault in sorted(faults.items()):
            logger.warning("%s: %s.", name, fault)
        return said

    def collator_options(
        self, model: Any, num_virtual_tokens: int | None = None, prompt_position: str | None = None
    ) -> dict[str, Any]:
        """Arguments of the collator for a model in memory; prompt length and position are the model's unless given."""
        from ..models.causal_lm import bare_model, max_positions
        from ..models.unlearner import unlearner_of

        unlearner, limit = unlearner_of(model), max_positions(bare_model(model))
        record = unlearner.spul_config
        num = unlearner.longest_prompt if num_virtual_tokens is None else num_virtual_tokens
        room = 1024 if limit is None else min(1024, limit - num)
        if room < LEAST_TOKENS:
            raise ValueError(
                f"the base has {limit} positions; a prompt of {num} virtual tokens leaves {max(room, 0)} to a row; "
                f"expected at least {LEAST_TOKENS}: take fewer, by --num-virtual-tokens."
            )
        if limit is not None and self.max_length is not None and self.max_length > limit - num:
            raise ValueError(
                f"--max-length {self.max_length} and a prompt of {num} virtual tokens exceed the base's {limit} "
                f"positions; expected --max-length {limit - num} at most, or a shorter prompt."
            )
        return {
            "max_length": room if self.max_length is None else self.max_length,
            "text_field": self.text_field,
            "append_eos": self.append_eos,
            "prompt_position": prompt_position or ("start" if record is None else record.prompt_position),
        }


def check_files(options: Any, *names: str) -> None:
    """Raise, before the libraries that read files are imported, unless they are there, none twice or of both sides.

    Args:
        options: the command's.
        names: of options, each a file, several, or None where it is not given.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if one is given twice to an option, or as rows to forget and as rows that stay.
    """
    from ..records.files import check_is_file

    before: list[tuple[str, str, Path]] = []
    for name in names:
        given, flag, side = getattr(options, name), f"--{name.replace('_', '-')}", name.removeprefix("test_")
        for path in [given] if isinstance(given, str) else given or ():
            check_is_file(path)
            file = Path(path).resolve()
            for other, others_side in ((flag, side) for flag, side, one in before if one == file):
                if other == flag:
                    raise ValueError(f"{flag} has {path} twice, whose rows would count twice; expected it once.")
                if {side, others_side} == {"forget", "retain"}:
                    raise ValueError(
                        f"{path} is given to {other} and to {flag}; expected rows to forget and rows that stay, each "
                        "in files of their own."
                    )
            before.append((flag, side, file))


def check_places(options: Any) -> None:
    """Raise unless what a training or an evaluation writes can be written, and its key be read.

    Args:
        options: the command's, with `output_dir`, `digest_key` and, of a training, `reference_dir`.

    Raises:
        FileExistsError, PermissionError: if a folder is a file, or may not be written to.
        FileNotFoundError: if there is no key.
        ValueError: if the file holds none, or a path is empty.
    """
    from ..records.digests import read_digest_key
    from ..records.files import check_can_hold

    for folder in (options.output_dir, getattr(options, "reference_dir", None)):
        if folder is not None:
            check_can_hold(folder)
    if options.digest_key is not None:
        read_digest_key(options.digest_key)


def saved_prompt(folder: str) -> SavedPrompt:
    """A saved prompt, read and checked before minutes of loading its base.

    Args:
        folder: folder or Hub name.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or another kind of adapter.
    """
    from ..prompts.checkpoint import read

    try:
        return read(folder, with_encoder=False)
    except OSError:
        raise
    except (TypeError, ValueError) as error:  # a TypeError in code is, here, a folder of another kind
        raise ValueError(f"{folder} is no prompt that can be loaded: {error}") from error


def check_new_prompt(folder: str) -> None:
    """Raise unless a prompt may be saved into a folder: it can be written to, and holds no prompt and no model.

    Raises:
        FileExistsError: if it does, or is a file.
        PermissionError: if it may not be written to.
    """
    from transformers.utils import CONFIG_NAME as MODEL_CONFIG

    from ..prompts.checkpoint import CONFIG_NAME
    from ..records.files import check_can_hold

    check_can_hold(folder)
    for name, why in (
        (CONFIG_NAME, "a saved prompt, which may be served"),
        (MODEL_CONFIG, "a model, into which transformers would load the prompt beside it"),
    ):
        if Path(folder).resolve().joinpath(name).exists():  # also of "new/../folder"
            raise FileExistsError(f"{folder!r} holds {why}; name another folder, or move that one.")


def prompts_left_out(folders: Collection[str]) -> dict[str, list[str]]:
    """Names of the prompts that folders hold beside the one that each is loaded as, unless their folders are given.

    Args:
        folders: of prompts; of a Hub name nothing is known here.
    """
    from ..gates.gated_files import ROUTING_NAME, read_routing

    given, found = {Path(one).resolve() for one in folders}, {}
    for folder in folders:
        names = read_routing(folder)[1]["prompts"] if Path(folder, ROUTING_NAME).is_file() else []
        others = [one for one in names if one != "default" and Path(folder, one).resolve() not in given]
        if others:
            found[folder] = others
    return found


@dataclass(kw_only=True)
class LoadOptions:
    """Options for loading models."""

    dtype: DType = option("type of the base's weights", "auto")
    bits: int | None = option("quantize the base to 8 or 4 bits")
    tokenizer: str | None = option("tokenizer, by name or folder; the base's by default")
    trust_remote_code: bool = option("run code of the model's repository", False)

    def load(self, name: str) -> Any:
        """A causal LM by name or folder."""
        return self.loader()(name)

    def loader(self) -> Any:
        """A function that loads a causal LM by name or folder."""
        from ..models.loading import load_causal_lm

        return partial(load_causal_lm, dtype=self.dtype, bits=self.bits, trust_remote_code=self.trust_remote_code)

    def load_tokenizer(self, name: str) -> Any:
        """The tokenizer of a base, unless another is named."""
        from ..models.loading import load_tokenizer

        return load_tokenizer(self.tokenizer or name, self.trust_remote_code)
