"""`spul gate fit` and `spul gate check`: a gate from files, for a prompt or a fixed refusal, and what it flags."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from .command import Command, printable
from .noting import ledger_for
from .shared import LoadOptions, check_files, option


@dataclass(kw_only=True)
class FitOptions(LoadOptions):
    """Options of `spul gate fit`."""

    adapter: str | None = option("folder of the saved prompt, which gets the gate")
    adapter_name: str = option("name of the prompt, in a folder of several", "default")
    refusal: str | None = option(
        "in place of --adapter: a fixed text, which flagged requests get as the answer, written as completions are, "
        "with a space in front where these have one"
    )
    output_dir: str | None = option("new or empty folder for --refusal and its gate, to evaluate and serve")
    kind: Literal["names", "text", "states"] = option("what it decides by: names, wording, or the base's states", ...)
    names: list[str] | None = option("full names that a gate of names flags")
    forget: str | None = option("file of requests to flag: rows with the column, or a .txt with one a line")
    retain: str | None = option("file of requests not to flag")
    paraphrases: str | None = option("file of rewordings of forget requests, which are reported on")
    column: str | None = option("column with the requests; prompt by default")
    recall: float | None = option("share of forget requests to flag, of a gate that is fit on them; 0.99 by default")
    spelling: bool | None = option(
        "whether misspelled words are read as the nearest known ones, in a gate of wording or of names, which is so "
        "unless told false"
    )
    seed: int | None = option("seed of the folds, of a gate that is fit on requests; 0 by default")
    layers: list[int] | None = option("layers that a gate of states tries; 8 by default")
    model: str | None = option("the base, for a gate of states and for conversations")
    ledger: str | None = option("the ledger that gets an entry of the refusal, with --request")
    request: str | None = option("name of the request in the ledger, a number rather than a person's name")


@dataclass(kw_only=True)
class CheckOptions(LoadOptions):
    """Options of `spul gate check`."""

    adapter: str = option("folder of the prompt, or of the fixed refusal, with its gate", ...)
    adapter_name: str = option("name of the prompt, in a folder of several", "default")
    texts: list[str] | None = option("requests, read as they are: without a chat template's words around them")
    file: str | None = option("file of requests: rows with the column, conversations too, or a .txt with one a line")
    column: str | None = option("column with the requests; prompt by default")
    model: str | None = option("the base, for a gate of states and for conversations")


def check_fit(options: FitOptions) -> None:
    """Raise for options that contradict each other and files that are not there, before torch is imported.

    Raises:
        FileExistsError, PermissionError: if the folder for a refusal has files in it, or cannot be made.
        FileNotFoundError: if a file is missing.
        ValueError: if options cannot be used.
    """
    if (options.adapter is None) == (options.refusal is None):
        found = "neither adapter nor refusal is" if options.adapter is None else "adapter and refusal are both"
        raise ValueError(
            f"{found} given; expected --adapter FOLDER, a saved prompt, which gets the gate, or --refusal TEXT "
            "--output-dir FOLDER, a fixed answer to flagged requests and the new folder of both."
        )
    if options.adapter is None:
        _check_refusal(options)
    else:
        _check_adapter(options, options.adapter)
    if options.layers and options.kind != "states":
        raise ValueError(f"layers are of a gate of states; a gate of {options.kind} reads none.")
    if options.spelling is not None and options.kind == "states":
        raise ValueError("spelling is read by a gate of names or of wording; one of states sees the base's tokens.")
    if options.column is not None and not (options.forget or options.retain or options.paraphrases):
        raise ValueError(f"column={options.column!r} is given without a file of requests; give forget and retain.")
    if options.kind == "names":
        _check_names(options)
    elif options.names:
        raise ValueError(f"names are for a gate of names; a gate of {options.kind} takes forget and retain.")
    elif options.forget is None or options.retain is None:
        raise ValueError(f"a gate of {options.kind} is fit on requests; give forget and retain, a file of each.")
    if options.kind == "states" and options.model is None:
        raise ValueError(
            "no base is given; expected the base, by name or folder: --model BASE. A gate of states reads its states."
        )
    check_files(options, "forget", "retain", "paraphrases")
    _check_column(options.column, options.forget, options.retain, options.paraphrases)


def _check_column(column: str | None, *files: str | None) -> None:
    """Raise for a column where all files, if there are any, are lines of text."""
    given = [file for file in files if file is not None]
    if column is not None and given and all(file.endswith(".txt") for file in given):
        raise ValueError(
            f"column={column!r} is of no effect on lines of text ({', '.join(given)}); leave it out, or give files of "
            "rows."
        )


def _check_names(options: FitOptions) -> None:
    """Raise unless the options are those of a gate of names, which is not fit."""
    of_fits = ("paraphrases", "recall", "seed")
    if given := [name for name in of_fits if getattr(options, name) is not None]:
        raise ValueError(
            f"{given[0]} is of a gate that is fit on requests; one of names takes forget and retain alone."
        )
    if not options.names:
        raise ValueError("a gate of names needs names: --names 'Jane Doe' 'John Roe'.")
    if (options.forget is None) != (options.retain is None):
        raise ValueError("forget and retain go together: give both, to measure the gate on, or neither.")


def _check_adapter(options: FitOptions, adapter: str) -> None:
    """Raise for options of a refusal beside a prompt, and unless the prompt's folder is there."""
    of_refusals = ("output_dir", "ledger", "request")
    if given := [name for name in of_refusals if getattr(options, name) is not None]:
        raise ValueError(
            f"--{given[0].replace('_', '-')} goes with --refusal; a prompt's gate is saved in its own folder, "
            "--adapter, and noted in a ledger with what is served. Leave it out."
        )
    if not os.path.isdir(adapter):
        raise FileNotFoundError(f"{adapter} is no folder here; expected that of a saved prompt.")


def _check_refusal(options: FitOptions) -> None:
    """Raise unless a refusal can be saved, and noted, as far as options and files show."""
    from ..records.files import check_new_folder

    if options.output_dir is None:
        raise ValueError("--refusal is given without the folder for it and its gate; name one: --output-dir FOLDER.")
    if options.adapter_name != "default":
        raise ValueError("--adapter-name is of a prompt in a folder of several; a refusal has none. Leave it out.")
    check_new_folder(options.output_dir)
    ledger_for(options.ledger, options.request)


def fit(options: FitOptions) -> int | None:
    """Fit a gate, print its report, and save it with the prompt, or with a fixed refusal.

    Raises:
        FileExistsError: if the folder for a refusal has files in it.
        FileNotFoundError: if a file is missing.
        ValueError: if options or texts cannot be used, or the request was revoked meanwhile, after its refusal is
            saved.
    """
    check_fit(options)
    at_work = ledger_for(options.ledger, options.request)
    _check_target(options)  # before minutes of fitting
    source = _Source(options, "prompt" if options.column is None else options.column)
    forget, retain, paraphrases = (
        source.texts(path, is_forget)
        for path, is_forget in ((options.forget, True), (options.retain, False), (options.paraphrases, True))
    )
    gate: Any
    if options.kind == "names":
        gate = _by_name(options, forget, retain)
    else:
        assert forget is not None
        assert retain is not None
        chosen = {"recall": options.recall, "seed": options.seed, "paraphrases": paraphrases}
        settings = {name: value for name, value in chosen.items() if value is not None}
        gate = _fitted(options, source, forget, retain, settings)
    said = _saved(gate, options)
    print(gate.report or "no report: give forget and retain requests to measure it on")
    print("\n".join(said), flush=True)
    if at_work is not None and options.output_dir is not None:
        at_work.note_trained(options.output_dir)
    return None


def _check_target(options: FitOptions) -> None:
    """Raise unless the refusal is a text that can answer, or the prompt is one that can get a gate."""
    from ..gates.gated_files import check_takes_gate
    from ..rivals.files import RIVAL_NAME
    from ..rivals.refusal import check_refusal

    if options.adapter is None:
        check_refusal(options.refusal or "")
    elif os.path.isfile(os.path.join(options.adapter, RIVAL_NAME)):
        raise ValueError(
            f"{options.adapter} holds a method without training, whose gate is saved with it; expected a saved "
            "prompt. Make a fixed refusal anew, --refusal TEXT, in another folder, --output-dir FOLDER."
        )
    else:
        check_takes_gate(options.adapter, options.adapter_name)


def _saved(gate: Any, options: FitOptions) -> list[str]:
    """Save a gate where `_check_target` found that it can be; lines to print."""
    from ..gates.gated_files import attach_gate
    from ..records.files import new_folder
    from ..rivals.refusal import write_refusal

    if options.adapter is not None:
        replaced = _kind_there(options.adapter, options.adapter_name)
        attach_gate(gate, options.adapter, options.adapter_name)
        where = f": {os.path.join(options.adapter, 'gate')}" if options.adapter_name == "default" else ""
        return [f"saved{where}", *([] if replaced is None else [f"replaced: {replaced}"])]
    assert options.refusal is not None
    assert options.output_dir is not None
    with new_folder(options.output_dir) as scratch:
        write_refusal(scratch, gate, options.refusal)
    return [f"saved: {options.output_dir}"]


def check_texts(options: CheckOptions) -> None:
    """Raise where there is nothing to check, or its file is not there, before torch is imported.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if there are no requests, or a column where no file has columns.
    """
    if not options.texts and options.file is None:
        raise ValueError("there is nothing to check; give texts, or a file of them.")
    if options.column is not None and options.file is None:
        raise ValueError(f"column={options.column!r} is given without a file of requests; give it as well: --file.")
    check_files(options, "file")
    _check_column(options.column, options.file)


def check(options: CheckOptions) -> int | None:
    """Print for each request whether the gate flags it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if there are no requests, or the gate is damaged.
    """
    from ..gates.any_gate import load, needs_base

    check_texts(options)
    source = _Source(options, "prompt" if options.column is None else options.column)
    texts = [*(options.texts or ()), *(source.texts(options.file) or ())]
    where = _gate_folder(options.adapter_name)
    _check_together(options)
    own = (source.base(), source.tokenizer()) if needs_base(options.adapter, subfolder=where) else ()
    gate = load(options.adapter, *own, subfolder=where)
    for text, flag in zip(texts, gate.flags(texts), strict=True):
        print(f"{'flagged' if flag else 'passed'}\t{printable(text)}")
    for part in gate.parts():  # of joined gates, two may fail on one text
        for kind, number in part.failures.items():
            print(f"the gate ({part.kind}) failed on {number} of them, which are flagged: {kind}")
    return None


def _check_together(options: CheckOptions) -> None:
    """Raise unless a gate is the one that was saved with its prompt or refusal, and would so be served."""
    from ..gates.gated_files import check_saved_together, prompt_folder
    from ..rivals.files import RIVAL_NAME, read_rival

    folder = os.path.join(options.adapter, prompt_folder(options.adapter_name))
    if os.path.isfile(os.path.join(folder, RIVAL_NAME)):
        read_rival(folder).check_gate()
    elif os.path.isdir(folder):  # of a Hub name, nothing is known here
        check_saved_together(folder)


def _gate_folder(adapter_name: str) -> str:
    """The folder of a prompt's gate, within the one that holds the prompts."""
    from ..gates.gated_files import GATE_FOLDER, prompt_folder

    return "/".join(part for part in (prompt_folder(adapter_name), GATE_FOLDER) if part)


def _kind_there(adapter: str, adapter_name: str) -> str | None:
    """The gate that a new one replaces, in words; None if there is none."""
    from ..gates.files import read_gate

    try:
        return f"{read_gate(adapter, subfolder=_gate_folder(adapter_name)).kind} gate"
    except FileNotFoundError:
        return None
    except ValueError as error:
        return f"a gate that could not be read ({error})"


class _Source:
    """Requests of files as the gate will see them, and the base and tokenizer where these are needed."""

    def __init__(self, options: FitOptions | CheckOptions, column: str) -> None:
        self.options, self.column = options, column
        self._tokenizer: Any = None

    def texts(self, path: str | None, is_forget: bool | None = None) -> list[str] | None:
        """The requests of a file; conversations as the chat template renders them, without special tokens."""
        if path is None:
            return None
        from ..data.encoder import RowEncoder
        from ..data.prompt_files import read_texts
        from ..gates.gate import prompt_texts

        found = read_texts(path, self.column, is_forget)
        if all(isinstance(one, str) for one in found):
            return found
        return prompt_texts([{"prompt": one} for one in found], RowEncoder(self.tokenizer(), sys.maxsize))

    def name(self) -> str:
        """The base's name or folder.

        Raises:
            ValueError: if it is not given.
        """
        from ..evaluation.loading import no_base_error

        if self.options.model is None:
            adapter = self.options.adapter
            why = "no base is given; expected the base, by name or folder"
            why = why if adapter is None else str(no_base_error(adapter)).rstrip(".")
            raise ValueError(
                f"{why}: --model BASE. Conversations are read as its chat template renders them, and a gate of states "
                "reads its states."
            )
        return self.options.model

    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = self.options.load_tokenizer(self.name())
        return self._tokenizer

    def base(self) -> Any:
        """The base."""
        return self.options.load(self.name())


def _by_name(options: FitOptions, forget: list[str] | None, retain: list[str] | None) -> Any:
    from ..gates.names import NameGate

    gate = NameGate(options.names or (), spelling=options.spelling is not False)
    if forget is not None and retain is not None:
        gate.report = gate.measure(forget, retain)
    return gate


def _fitted(
    options: FitOptions,
    source: _Source,
    forget: list[str],
    retain: list[str],
    settings: dict[str, Any],
) -> Any:
    from ..gates.state import StateGate
    from ..gates.text import TextGate

    if options.kind == "text":
        return TextGate.fit(forget, retain, spelling=options.spelling is not False, **settings)
    return StateGate.fit(source.base(), source.tokenizer(), forget, retain, layers=options.layers, **settings)


COMMANDS = {
    "fit": Command(
        FitOptions,
        fit,
        "spul gate fit --refusal ' I cannot help with that.' --output-dir refusal --kind text --forget f.jsonl "
        "--retain r.jsonl",
        "Fit a gate on requests, print how often it flags, and save it with a prompt, or make a fixed refusal of it.",
        check_fit,
    ),
    "check": Command(
        CheckOptions,
        check,
        "spul gate check --adapter out --texts 'Who is Jane Doe?' 'Which song won?'",
        "Print which requests a gate flags.",
        check_texts,
    ),
}
