"""The folder of an evaluation that resumes: refused where it holds another, cleared of what a killed run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..records.files import write_text
from ..records.messages import warn
from .aggregation import Measurement
from .results import EVALUATION_NAME, MEASUREMENTS_NAME, read_measurements, write_measurements
from .settings import published

SETTINGS_NAME = "settings.json"
PROGRESS_NAME = "progress-{}.jsonl"


def resumed(folder: Path, settings: dict[str, Any]) -> list[Measurement]:
    """The measurements of an interrupted run of the same evaluation in a folder, which is made if it is not there.

    Raises:
        ValueError: if it holds another evaluation, files that are not an evaluation's, or damaged ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    _check_folder(folder, settings)
    unknown = [name for name, model in settings["models"].items() if model["weights"] is None]
    if unknown and path.exists():
        warn(
            f"weights of {', '.join(unknown)} are not in memory and cannot be compared with those of the results in "
            f"{str(folder)!r}, which are taken for the same model's. If they are not, give another output_dir.",
        )
    write_text(path, json.dumps(settings, indent=1) + "\n")
    parts = sorted(folder.glob(PROGRESS_NAME.format("*")))
    found = [one for file in (folder / MEASUREMENTS_NAME, *parts) for one in read_measurements(file)]
    write_measurements(folder / MEASUREMENTS_NAME, found)  # without an incomplete last line
    remove_progress(folder)
    return found


def remove_progress(folder: Path) -> None:
    """Remove the processes' own files, once their measurements stand in the evaluation's."""
    for path in folder.glob(PROGRESS_NAME.format("*")):
        path.unlink(missing_ok=True)  # another evaluation in the folder has removed it meanwhile


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raise if a folder holds another evaluation, or one that is not of the settings beside it.

    It would be written over.
    """
    if not (folder / SETTINGS_NAME).exists():
        # Measurements of the controls alone may be those of another evaluation, put there to be taken over.
        parts = [folder / MEASUREMENTS_NAME, *sorted(folder.glob(PROGRESS_NAME.format("*")))]
        others = [path.name for path in parts if any(one.model == "unlearned" for one in read_measurements(path))]
        if (folder / EVALUATION_NAME).exists():
            others = [EVALUATION_NAME]
        if others:
            raise ValueError(
                f"{str(folder)!r} holds {others[0]} without the {SETTINGS_NAME} that spul.evaluate writes first: not "
                "an evaluation that can be resumed, and not one to write over. Give another output_dir, or move it."
            )
        return
    theirs = _record(folder / SETTINGS_NAME)
    if other := sorted(name for name in settings | theirs if settings.get(name) != theirs.get(name)):
        raise ValueError(
            f"{str(folder)!r} holds an evaluation that differs in {', '.join(other)}; give another output_dir, or "
            "remove that one."
        )
    evaluation = folder / EVALUATION_NAME
    if evaluation.exists() and _record(evaluation).get("settings") != published(settings):
        raise ValueError(
            f"{EVALUATION_NAME} in {str(folder)!r} is not that of the {SETTINGS_NAME} beside it, and would be written "
            "over. Give another output_dir, or move it."
        )


def _record(path: Path) -> dict[str, Any]:
    """The dict in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or UTF-8
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}): it is damaged, or no file of spul. Remove it with the other "
            "files of that evaluation, or give another output_dir."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(path)!r} holds a {type(found).__name__}; expected the fields of an evaluation. It is no file of "
            "spul: give another output_dir."
        )
    return found
