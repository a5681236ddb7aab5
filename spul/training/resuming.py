"""The identity of a training, by which it resumes from a checkpoint or is refused, and the newest whole checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from ..data.collator import ForgetRetainCollator
from ..losses.multiplier import RetainMultiplier
from ..losses.unlearning_loss import UnlearningLoss
from ..models.compat import CHECKPOINT_PREFIX
from ..prompts.checkpoint import CONFIG_NAME, folder_of
from ..records.digests import digest_of_tokenizer
from .row_digest import plain

logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
IDENTITY = "UnlearningTrainer"  # among the states of callbacks
CONTENT, OLD_CONTENT = "values", "content"  # names of the digest of rows, and of another one of earlier versions
DROPS_LAST = "dataloader_drop_last"
OPTIMIZER, ADAM = "optimizer", ("adam_beta1", "adam_beta2", "adam_epsilon")
SHOWN_DIGITS = 12
WRITERS = ("inline_container", "PytorchStreamWriter")  # parts of torch that write, as its errors name them


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str:
    """The newest complete checkpoint in a folder; newer ones that cannot be resumed are warned of.

    Raises:
        ValueError: if no checkpoint is complete.
    """
    folders = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}-*") if path.is_dir()]
    numbered = [(int(n), path) for path in folders if (n := path.name.rsplit("-", 1)[1]).isdigit()]
    for _, path in sorted(numbered, reverse=True):
        if (fault := _fault(path)) is None:
            return str(path)
        logger.warning("%s is incomplete and is skipped: %s.", path, fault)
    raise ValueError(
        f"resume_from_checkpoint=True, but {str(output_dir)!r} holds no complete checkpoint; leave it out to start "
        "anew."
    )


@contextmanager
def saving_into(folder: str | os.PathLike) -> Iterator[None]:
    """Context manager of saves: what fails in writing is an OSError that names the folder and the room that is left.

    torch and safetensors raise errors of their own where a disk is full, and torch's does not say so.

    Raises:
        OSError: if a file cannot be written.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in WRITERS):
            raise  # such as memory that is out, or another process that is gone
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"{str(folder)!r} could not be written to ({error}); its disk has {free / 2**20:,.0f} MiB free. Make "
            "room, lower save_total_limit, or name another folder; a training resumes from its last complete "
            "checkpoint."
        ) from error


def identity_of(
    rows: Mapping[str, Any],
    base: str | None,
    loss: UnlearningLoss,
    multiplier: RetainMultiplier | None,
    collator: ForgetRetainCollator,
    args: TrainingArguments,
    rows_of_a_step: int,
    lengths: str | None,
    forget_fraction: float | None,
    alternate: bool,
) -> dict[str, Any]:
    """All that the rows of every step and their loss depend on, and settings of the optimizer, as JSON.

    The digest of the rows is plain and confirms a guess of them: it stays in the checkpoints, by which work resumes.

    Args:
        rows: of `TrainingRows.identity`.
        base: fingerprint of the frozen base, or of the model that the reference of a base that trains was built from;
            None if that is not known.
        loss: the objective.
        multiplier: of its retain budget, if it has one.
        collator: of the training.
        args: of the training.
        rows_of_a_step: of all processes, by the batch size that was found.
        lengths: digest of a column of lengths, by which rows are grouped.
        forget_fraction: as of `UnlearningTrainer`.
        alternate: likewise.
    """
    encoder = collator.encoder
    found = {
        "rows": rows,
        "base": base,
        "loss": loss.to_dict(),
        "multiplier": None if multiplier is None else multiplier.settings(),
        "generic_completions": collator.generic_completions,
        "alternates": collator.alternates,
        "pairs": collator.pairs,
        "seed_of_draws": collator.seed,
        "resample": collator.resample,
        "tokenizer": digest_of_tokenizer(collator.tokenizer),
        "max_length": encoder.max_length,
        "text_field": encoder.text_field,
        "append_eos": encoder.append_eos,
        "prompt_position": encoder.prompt_position,
        "forget_fraction": forget_fraction,
        "alternate": alternate,
        "train_sampling_strategy": args.train_sampling_strategy,
        "seed_of_order": args.seed if args.data_seed is None else args.data_seed,
        "rows_of_a_step": rows_of_a_step,
        DROPS_LAST: args.dataloader_drop_last,
        "lengths": lengths,
        "neftune_noise_alpha": args.neftune_noise_alpha,
        OPTIMIZER: {name: getattr(args, name) for name in ("learning_rate", "weight_decay", *ADAM)},
    }
    return json.loads(json.dumps(found, default=plain))


def check_resumes(checkpoint: str | os.PathLike, identity: Mapping[str, Any], finds_batch_size: bool) -> None:
    """Check that a training goes on from its checkpoint, with its rows and loss; warn of one that has no note of them.

    `Trainer` would begin the optimizer and the schedule anew where their states are missing, in silence.

    Args:
        checkpoint: folder.
        identity: of the training that resumes, `identity_of`.
        finds_batch_size: whether it has `auto_find_batch_size`.

    Raises:
        ValueError: if the checkpoint is incomplete, or they differ, with what was saved and what was passed.
    """
    if fault := _fault(Path(checkpoint)):
        raise ValueError(
            f"{str(checkpoint)!r} cannot be resumed: {fault}. Give another checkpoint, or True for the newest that is "
            "complete. To train its prompt by a schedule of its own, load it with is_trainable=True."
        )
    states = (_state(Path(checkpoint)) or {}).get("stateful_callbacks") or {}
    if (saved := states.get(IDENTITY)) is None:
        logger.warning(
            "%s does not say what rows and loss it was trained with, as one of plain Trainer: whether they are the "
            "same is not checked.",
            checkpoint,
        )
        return
    before, now = dict(_entries(saved)), dict(_entries(identity))
    names = [name for name in before | now if before.get(name) != now.get(name)]
    names = [name for name in names if name.split(".")[0] in saved]  # earlier versions noted less
    if DROPS_LAST not in saved:
        # Nor which rows were rewritten, where they were tokenized ahead: the digest of the rows compares those. And of
        # the rows of a step those that were asked for, which may have been too many.
        unknown = ["rows.rewritten"] if "rows.rewritten" not in before else []
        unknown += ["rows_of_a_step"] if finds_batch_size else []
        names = [name for name in names if name not in unknown]
    if None in (before.get("base"), now.get("base")):  # not known on one side
        names = [name for name in names if name != "base"]
    digests = [f"rows.{OLD_CONTENT}", f"rows.{CONTENT}"]
    if before.get(digests[0]) is not None:
        logger.warning(
            "%s has a digest of its rows by an earlier version of spul, which is another: whether rows of the same "
            "number are the same is not checked.",
            checkpoint,
        )
        names = [name for name in names if name not in digests]
    # Transformers takes these from the optimizer's state, whatever is passed.
    ignored = [name for name in names if name.startswith(f"{OPTIMIZER}.")]
    names = [name for name in names if name not in ignored]
    if any(name.startswith("rows.") and name not in digests for name in names):
        names = [name for name in names if name not in digests]  # of another number of rows they say nothing

    def listed(names: list[str]) -> str:
        found = (f"{name}: {_in_words(before.get(name))} saved, {_in_words(now.get(name))} passed" for name in names)
        return "; ".join(found)

    if names:
        raise ValueError(
            f"{str(checkpoint)!r} is of a training with other rows or settings: {listed(names)}. Resume with what "
            "was saved, or train from the start in another folder."
        )
    if ignored:
        logger.warning(
            "%s goes on with the optimizer that it has saved: %s, of no effect.", checkpoint, listed(ignored)
        )


def saved_batch_size(checkpoint: str | os.PathLike) -> int | None:
    """The batch size of a checkpoint, with which `Trainer` goes on under `auto_find_batch_size`; None if unknown."""
    return (_state(Path(checkpoint)) or {}).get("train_batch_size")


def load_trained(trainer: Any, checkpoint: str | os.PathLike, is_trainable: bool = True) -> bool:
    """Restore layers, or the adapters that train, from a checkpoint; False where `Trainer` has to restore.

    `Trainer` looks for the adapter that trains in the checkpoint itself, where PEFT saves the one named "default", and
    every other in a folder of its own. Adapters that do not train stay as they are.

    Args:
        trainer: the `UnlearningTrainer`.
        checkpoint: folder.
        is_trainable: whether training goes on; False has PEFT put LoRA into evaluation mode.

    Raises:
        ValueError: if the checkpoint lacks an adapter that trains.
    """
    model = trainer.model
    if trainer.unlearner.has_own_checkpoint:
        trainer.unlearner.load_checkpoint(checkpoint)
        return True
    if trainer.is_deepspeed_enabled or not isinstance(model, PeftModel):
        return False
    own = {name: Path(checkpoint, folder_of(name)) for name in model.active_adapters}
    for name, folder in own.items():
        if not (folder / CONFIG_NAME).is_file():
            found = [path.parent.name for path in sorted(Path(checkpoint).glob(f"*/{CONFIG_NAME}"))]
            found += ["default"] if Path(checkpoint, CONFIG_NAME).is_file() else []
            raise ValueError(
                f"{str(checkpoint)!r} holds no adapter {name!r}, which trains; it holds {found}. Name the adapter as "
                "it was saved, or train from the start in another folder."
            )
    for name, folder in own.items():
        model.load_adapter(str(folder), name, is_trainable=is_trainable)
    return True


def _fault(checkpoint: Path) -> str | None:
    """The part that a folder lacks to be resumed from; None if it is a complete checkpoint."""
    if not checkpoint.is_dir():
        return "it is no folder"
    if _state(checkpoint) is None:  # written last, so missing where a process was killed while it saved
        return f"it has no {STATE_NAME} that can be read"
    of_engine = any(checkpoint.glob("global_step*"))  # DeepSpeed's, which has the optimizer and its schedule
    for pattern, name in (("*optimizer*", "the optimizer"), ("scheduler.pt", "the schedule")):
        if not of_engine and not any(checkpoint.glob(pattern)):
            return f"it has no state of {name}, as one that was saved with save_only_model=True"
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        if not zipfile.is_zipfile(path):  # as `torch.save` writes, whose table of contents stands at the end
            return f"{path.name} is damaged or was cut short"
    for path in sorted(checkpoint.rglob("*.safetensors")):  # adapters of other names have folders of their own
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged or was cut short ({error})"
    return None


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer's state in a checkpoint; None if there is none that can be read."""
    try:
        found = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "global_step" in found else None


def _entries(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested settings, the names joined by dots; what is None counts as left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _in_words(value: Any) -> str:
    is_digest = isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2
    return "none" if value is None else value[:SHOWN_DIGITS] if is_digest else str(value)
