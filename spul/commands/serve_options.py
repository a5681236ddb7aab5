"""Options of `spul serve`, and their check, which needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .shared import LoadOptions, option

VLLM_URL = "http://127.0.0.1:8000"


@dataclass(kw_only=True)
class ServeOptions(LoadOptions):
    """Options of `spul serve`."""

    model: str = option("the base, by name or folder", ...)
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=FOLDER of each prompt, or fixed refusal, with its gate, the first first where several gates "
            "flag a request; or one folder that GatedUnlearner.save_pretrained wrote; with a ledger a name is that of "
            "a request in it"
        },
    )
    always: list[str] = field(
        default_factory=list, metadata={"help": "names of prompts that every request gets, without asking a gate"}
    )
    allow_other_base: bool = option("serve prompts although their records do not name this base's weights", False)
    served_model_name: str | None = option("the model's name in requests; the last part of --model by default")
    device: str | None = option("where the base runs; a GPU by default, if there is one")
    engine: str = option(
        "transformers, which answers in this process, or vllm, in front of a running vLLM", "transformers"
    )
    vllm_url: str | None = option(f"where vLLM runs; {VLLM_URL} by default")
    vllm_model: str | None = option("the model's name at vLLM; --model by default")
    vllm_key_file: str | None = option("file with vLLM's API key")
    host: str = option("address to bind to", "127.0.0.1")
    port: int = option("port to bind to; 0 for a free one", 8080)
    admin_token_file: str | None = option("file with the token that lets its holder add and revoke prompts")
    prompts_dir: str | None = option("folder within which prompts may be added")
    ledger: str | None = option(
        "file of the ledger that gets an entry of each answer, and of each prompt that comes or goes; it has the "
        "requests after which the prompts are named, and one that it says is revoked is not served, or no longer"
    )
    server_name: str | None = option(
        "name of this server in the ledger, another for each that shares it; machine, host and port by default"
    )
    record: str | None = option(
        "MODULE:FUNCTION that takes each event, a dict: an answer, a prompt that comes or goes"
    )
    max_body_bytes: int = option("most bytes of a request", 1 << 20)
    max_prompt_tokens: int | None = option("most tokens of a request; as many as the model has positions by default")
    max_new_tokens: int = option("most tokens of an answer", 512)
    max_batch: int = option("most requests that are answered together", 16)
    max_waiting: int = option("most requests that may wait", 128)
    timeout: float = option("most seconds for a request", 120.0)


def check(options: ServeOptions) -> None:
    """Raise for options that contradict each other, a ledger that cannot go on, and files and folders that are not
    there, before torch is imported.

    Raises:
        FileNotFoundError: if a folder or a file is missing.
        ValueError: if options cannot be used.
    """
    from ..records.files import check_is_file
    from ..records.ledger import Ledger

    if options.engine not in ("transformers", "vllm"):
        raise ValueError(f'engine={options.engine!r}; expected "transformers" or "vllm".')
    _check_names(options)
    of_vllm = [name for name in ("vllm_url", "vllm_model", "vllm_key_file") if getattr(options, name) is not None]
    if of_vllm and options.engine != "vllm":
        raise ValueError(f"{of_vllm[0]} is given, and the engine is {options.engine}; give --engine vllm as well.")
    if options.prompts_dir is not None and options.admin_token_file is None:
        raise ValueError("prompts_dir is for adding prompts, which needs admin_token_file.")
    for path in (options.vllm_key_file, options.admin_token_file):
        if path is not None and not Path(path).is_fifo():  # a pipe, as a shell makes it of <(pass show token)
            check_is_file(path)
    folders = folders_of(options.prompts)
    if not folders:
        raise ValueError(
            "there is no prompt to serve, and the base alone is not served. Name one with its gate: --prompts "
            "NAME=FOLDER, where FOLDER has the prompt, or a fixed refusal, and its gate in gate/; --always NAME has "
            "it on without a gate."
        )
    if options.always and not isinstance(folders, dict):
        raise ValueError("always goes with prompts that are named: --prompts NAME=FOLDER.")
    if options.ledger is not None:
        Ledger(options.ledger).check_goes_on()


def _check_names(options: ServeOptions) -> None:
    """Raise for an empty name: the default would take its place in silence, and an empty host is every interface."""
    from ..records.ledger_events import check_server

    examples = {
        "served_model_name": "opt-1.3b",
        "server_name": "gpu-1",
        "vllm_model": "facebook/opt-1.3b",
        "host": "127.0.0.1",
    }
    for name, example in examples.items():
        if (value := getattr(options, name)) is not None:
            check_server(value, name, example)


def folders_of(prompts: Sequence[str]) -> dict[str, str] | str:
    """The folders of prompts by their names, or the one of all."""
    if len(prompts) == 1 and "=" not in prompts[0]:
        return prompts[0]
    found: dict[str, str] = {}
    for one in prompts:
        name, is_named, folder = one.partition("=")
        if not (is_named and name and folder) or name in found:
            raise ValueError(f"prompts has {one!r}; expected NAME=FOLDER, each name once.")
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder!r}, of the prompt {name!r}, is no folder.")
        found[name] = folder
    return found
