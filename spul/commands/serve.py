"""`spul serve`: an OpenAI-compatible server of a base with prompts, or fixed refusals, behind gates."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Command, printable
from .serve_options import VLLM_URL, ServeOptions, check, folders_of
from .shared import prompts_left_out, saved_prompt

if TYPE_CHECKING:
    from ..records.ledger_states import RequestState
    from ..serving.served import ServedPrompts

logger = logging.getLogger(__name__)


def _check_listens(host: str, port: int) -> None:
    """Raise, before minutes of loading, if another program listens at an address, or it is none of this machine."""

    async def bind() -> None:  # as uvicorn does, at each address of the host
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, host, port, start_serving=False)).close()

    try:
        asyncio.run(bind())
    except OSError as error:
        raise OSError(
            f"the server cannot listen at --host {host} --port {port} ({error}); name another, or --port 0 for a "
            "free one."
        ) from error


def run(options: ServeOptions) -> None:
    """Load and say what is served, serve until the process is told to stop, then answer what is under way.

    Raises:
        FileNotFoundError: if a folder, a gate or a file is missing.
        OSError: if the server cannot listen where it is told to.
        ValueError: if there is no prompt, one does not fit the base, or an option is out of range.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(
            'spul serve needs further libraries; in a clone of its repository: pip install ".[serve]".'
        ) from error

    _check_listens(options.host, options.port)
    _say("checking options and prompts")
    app, limits = build(options)
    for line in what_is_served(options, app.state.served):
        _say(line)
    if options.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("The server asks for no key: whoever reaches %s:%d can use it.", options.host, options.port)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=int(limits.timeout) + 1)


def _say(line: str) -> None:
    """Print a line at once, also where the output is a file: loading takes minutes."""
    print(printable(line), flush=True)


def build(options: ServeOptions) -> tuple[Any, Any]:
    """The server of some options, and its limits.

    Raises:
        FileNotFoundError, ValueError: as `run`.
    """
    from ..serving.requests import Limits
    from ..serving.server import make_app

    check(options)
    names = ("max_body_bytes", "max_prompt_tokens", "max_new_tokens", "max_batch", "max_waiting", "timeout")
    limits = Limits(**{name: getattr(options, name) for name in names})
    key = None if options.vllm_key_file is None else _secret(options.vllm_key_file)
    record = _recorder(options)
    token = None if options.admin_token_file is None else _secret(options.admin_token_file)
    check_noted = _check_noted(options)
    served = _loaded(options, check_noted)
    for name, one in served.served.items():
        check_noted(name, one["prompt_sha256"], name not in served.refusals)
    engine = _engine(options, served, limits, key)
    model = options.served_model_name or Path(options.model).resolve().name  # of ".", too
    return make_app(engine, model, limits, record, token, check_noted, _states(options), _name(options)), limits


def what_is_served(options: ServeOptions, served: ServedPrompts) -> list[str]:
    """A line for each request: name, folder, type and length of its prompt, its gate, and how the ledger has it."""
    from peft import PeftType

    from ..records.ledger import Ledger
    from ..serving.loading import ALWAYS

    folders = folders_of(options.prompts)
    states = {} if options.ledger is None else Ledger(options.ledger).states()
    configs: Any = served.gated.unlearner.peft_config
    lines = []
    for name, one in served.served.items():
        in_folder = folders if name == "default" else f"{folders}/{name}"
        folder = folders[name] if isinstance(folders, dict) else in_folder
        kind = one["kind"]
        if name not in served.refusals:
            num = configs[name].num_virtual_tokens
            kind = f"{PeftType(configs[name].peft_type).value.lower()} of {num} virtual tokens"
        gate = "always on" if one["gate"] == ALWAYS else f"gate: {one['gate']}"
        noted = "no ledger" if options.ledger is None else f"ledger: {states[name].now}"
        lines.append(f"{name}: {folder}, {kind}; {gate}; {noted}")
    return lines


def _check_noted(options: ServeOptions) -> Callable[[str, str | None, bool], None]:
    """Raises for a prompt, by name and SHA-256, that the ledger says was revoked, or whose name it does not know."""
    if options.ledger is None:
        return lambda name, prompt_sha256, has_weights: None
    from ..records.ledger import Ledger

    ledger, folder = Ledger(options.ledger), folders_of(options.prompts)

    def check_noted(name: str, prompt_sha256: str | None, has_weights: bool) -> None:
        ledger.check_not_revoked(name, prompt_sha256, has_weights)
        try:
            ledger.check_known(name)
        except ValueError:
            if name != "default" or not isinstance(folder, str):
                raise
            raise ValueError(
                f"the ledger {options.ledger!r} knows no request {name!r}, which is what a prompt is called that was "
                f"given no name. Give it that of its request: --prompts REQUEST={folder}, and one for each further "
                "prompt of the folder."
            ) from None

    return check_noted


def _name(options: ServeOptions) -> str:
    """The name of this server in the ledger: given, or where it listens, so that it has the same after a restart."""
    port = f"process-{os.getpid()}" if options.port == 0 else options.port
    return options.server_name or f"{platform.node()}/{options.host}:{port}"


def _states(options: ServeOptions) -> Callable[[], Mapping[str, RequestState]] | None:
    """A look at the ledger's requests, also as other programs leave them; None without a ledger."""
    if options.ledger is None:
        return None
    from ..records.ledger_follower import LedgerFollower

    found = LedgerFollower(options.ledger).states
    found()  # the long read of the beginning, before there are requests
    return found


def _loaded(options: ServeOptions, check_noted: Callable[[str, str | None, bool], None]) -> ServedPrompts:
    """Prompts and refusals on their base, behind their gates."""
    import torch

    from ..gates.gated_files import prompt_folder
    from ..records.spul_config import read_spul_config
    from ..serving.loading import check_folders, is_rival, load_gated
    from ..serving.proxy import check_address
    from ..serving.served import ServedPrompts

    folders = folders_of(options.prompts)
    best = "cuda" if torch.cuda.is_available() and options.engine == "transformers" else "cpu"
    device = best if options.device is None else options.device
    # All that can be refused is, before minutes of loading.
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used ({error}); expected such as cpu or cuda:0.") from error
    if options.vllm_url is not None:
        check_address(options.vllm_url, "vllm_url")
    names, num_refusals = list(folders if isinstance(folders, dict) else _gated_names(folders)), 0
    if isinstance(folders, dict):
        check_folders(folders, options.always)
        for name, folder in folders.items():
            if is_rival(folder):
                check_noted(name, None, False)
                num_refusals += 1
            else:
                check_noted(name, saved_prompt(folder).spul_config.weights_sha256, True)
        for folder, others in prompts_left_out(folders.values()).items():
            logger.warning(
                "%s also holds the prompts %s, which are not served; pass it alone, or each.", folder, others
            )
    else:
        for name in names:
            check_noted(name, read_spul_config(folders, subfolder=prompt_folder(name)).weights_sha256, True)
    counts = {"prompt": len(names) - num_refusals, "refusal": num_refusals}
    prompts = " and ".join(f"{num} {what}{'s' * (num > 1)}" for what, num in counts.items() if num)
    _say(f"loading the base {options.model} on {device}, for {prompts}: {', '.join(names)}")
    start = time.monotonic()
    model, tokenizer = options.loader()(options.model, device=device), options.load_tokenizer(options.model)
    _say(f"the base is loaded, after {time.monotonic() - start:.0f} s; loading {prompts}, and what turns them on")
    allowed, allow_other_base = options.prompts_dir, options.allow_other_base
    if isinstance(folders, dict):
        return ServedPrompts.from_folders(model, tokenizer, folders, options.always, allow_other_base, allowed)
    return ServedPrompts(load_gated(model, tokenizer, folders, allow_other_base), allowed, allow_other_base)


def _gated_names(folder: str) -> list[str]:
    """Names of the prompts behind gates in a folder."""
    from ..gates.gated_files import ROUTING_NAME, read_routing
    from ..serving.loading import is_rival

    if is_rival(folder):
        raise ValueError(f"{folder} holds no prompt, and has no name here; give it one: --prompts NAME={folder}.")
    if Path(folder).is_dir() and not Path(folder, ROUTING_NAME).is_file():
        raise FileNotFoundError(
            f"{folder} has no prompts behind gates ({ROUTING_NAME}). Fit the gate of its prompt, spul gate fit "
            f"--adapter {folder}, or have the prompt on for every request, --prompts NAME={folder} --always NAME."
        )
    return read_routing(folder)[1]["prompts"]


def _engine(options: ServeOptions, served: Any, limits: Any, key: str | None) -> Any:
    if options.engine == "transformers":
        from ..serving.batches import TransformersEngine

        return TransformersEngine(served, limits)
    from ..serving.proxy import VllmEngine

    url = VLLM_URL if options.vllm_url is None else options.vllm_url
    return VllmEngine(served, limits, url, options.vllm_model or options.model, key)


def _secret(path: str) -> str:
    """A token in a file, without white space around it."""
    from ..serving.requests import check_header_text

    try:
        found = Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); expected a token alone.") from error
    check_header_text(found, f"the token in {path}")
    return found


def _recorder(options: ServeOptions) -> Callable[[dict[str, Any]], Any] | None:
    """The taker of events: the ledger, then the function; None without either."""
    takers: list[Callable[[dict[str, Any]], Any]] = []
    if options.ledger is not None:
        from ..records.ledger import Ledger
        from ..records.ledger_events import LedgerEvent

        ledger = Ledger(options.ledger)
        takers.append(lambda event: ledger.append(LedgerEvent(**event)))
    if options.record is not None:
        takers.append(_function(options.record))

    def record(event: dict[str, Any]) -> None:
        for take in takers:
            take(event)

    return record if takers else None


def _function(name: str) -> Callable[[dict[str, Any]], Any]:
    """The function that `MODULE:FUNCTION` names."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"record={name!r} is not found ({error}); expected MODULE:FUNCTION.") from error
    if not callable(found):
        raise ValueError(f"record={name!r} is a {type(found).__name__}; expected a function of one dict.")
    return found


COMMANDS = {
    "": Command(
        options=ServeOptions,
        run=run,
        example="spul serve --model facebook/opt-1.3b --prompts jane-doe=out/jane-doe --port 8080",
        purpose="Serve a base with prompts, or fixed refusals, behind gates, by OpenAI's API.",
        check=check,
    )
}
