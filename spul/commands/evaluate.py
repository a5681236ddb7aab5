"""`spul evaluate`: an unlearned model measured, attacked, and checked against conditions."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command
from .names import ATTACKS, MEASURES, quoted
from .shared import LoadOptions, RowOptions, check_files, check_places, option
from .wording import in_options

if TYPE_CHECKING:
    from ..evaluation.conditions import Condition
    from ..evaluation.results import Evaluation

logger = logging.getLogger(__name__)

FAILED = 1


@dataclass(kw_only=True)
class EvaluateOptions(LoadOptions, RowOptions):
    """Options of `spul evaluate`."""

    model: str = option("the base, with --adapter; or the unlearned model itself, with --base where it has one", ...)
    adapter: str | None = option(
        "the unlearned model: folder of a prompt, gated or not, a fixed refusal or another method without training, "
        "layers, LoRA, or weights"
    )
    generic: list[str] | None = option(
        "answers that count as generic, leading space included; by default those that the adapter was trained to, by "
        "its record, or the text of a fixed refusal"
    )
    base: str | None = option("the model before, where --model is the unlearned one")
    retrained: str | None = option("a model that never saw the forget rows, the yardstick")
    reference: str | None = option("another such model, for the reference attack on membership")
    forget: list[str] = option("files of the rows that were to be forgotten", ...)
    retain: list[str] = option("files of the rows that were to stay", ...)
    test_forget: list[str] = option("files of other forget rows", ...)
    test_retain: list[str] = option("files of other retain rows", ...)
    unseen: list[str] | None = option("files of rows like the forget rows that no model was trained on")
    unrelated_texts: str | None = option("a text file with a running text on each line")
    measures: list[str] | None = option(f"measures to take, all by default: {quoted(MEASURES)}")
    attacks: list[str] | None = option(f"attacks on the input, all by default: {quoted(ATTACKS)}")
    attack_rows: int = option("most rows of a set that are attacked", 200)
    names: list[str] | None = option("full names of those forgotten, which some attacks disguise")
    relearn_lr: float = option("learning rate of relearning a prompt, layers or LoRA", 1e-2)
    relearn_model_lr: float = option("the same of whole weights", 1e-4)
    free_form: bool = option("answers are texts, even if few are different", False)
    max_new_tokens: int = option("most tokens of a free-form answer", 200)
    batch_size: int = option("rows of a forward pass", 32)
    seed: int = option("seed of all draws", 0)
    digest_key: str | None = option("file of the owner's secret: the results then have digests of the rows")
    output_dir: str = option("folder of results and report", ...)
    evidence: str | None = option("new folder for an evidence pack: report, card, measurements and ledger entry")
    ledger: str | None = option("the ledger that the pack's entry is added to; one in the pack by default")
    request: str | None = option("name of the request, as in the ledger; the adapter's in the pack's own by default")
    fail_if: list[str] | None = option(
        "conditions for exit status 1, such as 'test_forget.accuracy.high > 0.05': [MEASURE:] ROWS.METRIC.END"
    )

    def __post_init__(self) -> None:
        """Make of `--model BASE --adapter FOLDER` what `--model FOLDER --base BASE` is, and of hyphens spaces."""
        self.measures = self.measures and [name.replace("-", " ") for name in self.measures]
        if self.adapter is None:
            return
        if self.base is not None:
            raise ValueError("adapter and base are both given; expected --model BASE --adapter FOLDER.")
        self.model, self.base, self.adapter = self.adapter, self.model, None


def check(options: EvaluateOptions) -> None:
    """Raise for options that contradict each other and files that are not there, before torch is imported.

    Raises:
        FileExistsError, PermissionError: if nothing can be saved into the folder.
        FileNotFoundError: if a file is missing.
        ValueError: if options cannot be used.
    """
    options.check_template()
    check_places(options)
    models = (options.model, options.base, options.retrained, options.reference)
    if Path(options.output_dir).resolve() in [Path(one).resolve() for one in models if one is not None]:
        raise ValueError(
            f"--output-dir {options.output_dir} is the folder of a model, with which the results would be served and "
            f"uploaded; expected one of their own, such as {options.output_dir}-evaluation."
        )
    check_files(options, "forget", "retain", "test_forget", "test_retain", "unseen", "unrelated_texts")
    _check_noted(options)


def run(options: EvaluateOptions) -> int | None:
    """Evaluate a model, write its results, report and card, and check conditions.

    Raises:
        FileExistsError: if the folder of the evidence is not empty.
        FileNotFoundError: if a file is missing.
        ImportError: if matplotlib is not installed.
        ValueError: if rows, options or conditions cannot be used.
    """
    from ..data.collator import ForgetRetainCollator
    from ..data.prompt_files import read_texts
    from ..evaluation.attack_settings import AttackSettings
    from ..evaluation.conditions import failures
    from ..evaluation.evidence import check_new
    from ..evaluation.loading import load_unlearned
    from ..evaluation.report.plotting import require_matplotlib
    from ..evaluation.run import evaluate
    from ..models.compat import PartialState

    check(options)
    measures = options.measures or list(MEASURES)
    attacks = AttackSettings(
        names=options.names or (),
        only=tuple(options.attacks or ()),
        num_rows=options.attack_rows,
        relearn_lr=options.relearn_lr,
        relearn_model_lr=options.relearn_model_lr,
    )
    conditions = _conditions(options, measures)
    if options.evidence is not None:
        check_new(options.evidence, options.ledger)
    require_matplotlib()  # for the report, before hours of measuring
    source_of_generic = "--generic" if options.generic is not None else f"{options.model}, its answer"
    options.generic = _generic(options)
    splits = {
        "train_forget": options.rows(options.forget, True),
        "train_retain": options.rows(options.retain, False),
        "test_forget": options.rows(options.test_forget, True),
        "test_retain": options.rows(options.test_retain, False),
    }
    unseen = None if options.unseen is None else options.rows(options.unseen)
    texts = [] if options.unrelated_texts is None else read_texts(options.unrelated_texts)
    loaded = load_unlearned(
        options.model, options.base, options.tokenizer, options.loader(), options.trust_remote_code
    )
    others = {"retrained": options.retrained, "reference": options.reference}
    others |= {"base": options.base} if loaded.kind == "model" else {}
    named = {name.removeprefix("train_"): rows for name, rows in splits.items()}
    said = options.warn_of_boundaries(
        loaded.tokenizer, named, {} if unseen is None else {"unseen": unseen}, source_of_generic
    )
    collator = ForgetRetainCollator(loaded.tokenizer, options.generic, **options.collator_options(loaded.model))
    collator.encoder.said_completions = said
    found = evaluate(
        loaded.model,
        splits,
        collator,
        **{name: options.load(folder) for name, folder in others.items() if folder is not None},
        unseen=unseen,
        unrelated_texts=texts,
        measures=measures,
        attacks=attacks,
        output_dir=options.output_dir,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        free_form=options.free_form,
        seed=options.seed,
        digest_key=options.digest_key,
    )
    if PartialState().is_main_process:
        _write(found, options)
    failed = failures(found, conditions)
    if PartialState().is_main_process:
        for line in failed:
            print(f"failed: {line}")
        if conditions and not failed:
            print(f"passed: {len(conditions)} condition(s)")
    return FAILED if failed else None


def _conditions(options: EvaluateOptions, measures: list[str]) -> list[Condition]:
    """The conditions, checked before hours of measuring: they and the attacks are of measures that are taken."""
    from ..evaluation.conditions import INPUT_ATTACK, Condition
    from ..evaluation.measures import MEASURES as TABLE

    found = [Condition.parse(text) for text in options.fail_if or ()]
    if options.attacks and INPUT_ATTACK not in measures:
        raise ValueError(
            f"attacks are given, and {INPUT_ATTACK!r} is none of the measures: add it, or leave them out."
        )
    for one in found:
        if one.measure not in measures:
            raise ValueError(f"the condition {str(one)!r} is of a measure that is not taken: add it to measures.")
        sets, metrics = TABLE[one.measure].rows, TABLE[one.measure].metrics
        if sets and one.rows not in sets:
            raise ValueError(f"the condition {str(one)!r} is of no set of rows; expected one of {', '.join(sets)}.")
        if one.metric not in metrics:
            raise ValueError(
                f"the condition {str(one)!r} is of a metric that {one.measure!r} has not; expected one of "
                f"{', '.join(metrics)}."
            )
    return found


def _generic(options: EvaluateOptions) -> list[str]:
    """The answers that count as generic: those given, or those of the record; warns where these differ."""
    from ..data.rows import normalized

    if (refusal := _refusal(options.model)) is not None:
        if options.generic is not None and normalized(refusal) not in map(normalized, options.generic):
            logger.warning("--generic %s: the fixed refusal %r is none of these.", options.generic, refusal)
        return options.generic or [refusal]
    recorded = _recorded(options.model)
    if options.generic is None:
        if recorded is None:
            raise ValueError(
                f"{options.model} has no record of the answers that it was trained to; give those that count as "
                "generic: --generic ' neutral' ' unknown'."
            )
        return recorded
    if recorded is not None and set(map(normalized, options.generic)) != set(map(normalized, recorded)):
        logger.warning(
            "--generic %s: the record says that the model was trained to %s; only those given count as generic.",
            options.generic,
            recorded,
        )
    return options.generic


def _refusal(folder: str) -> str | None:
    """The text of a saved fixed refusal; None of anything else."""
    from ..evaluation.loading import kind_of
    from ..rivals.files import read_rival
    from ..rivals.refusal import FixedRefusal

    if kind_of(folder) != "rival" or (saved := read_rival(folder)).kind != FixedRefusal.kind:
        return None
    saved.check(FixedRefusal.fields_saved)
    return saved.fields["refusal"]


def _recorded(folder: str) -> list[str] | None:
    """The generic completions in an adapter's record, or in those of its prompts, if all have the same; else None."""
    from ..evaluation.loading import kind_of
    from ..gates.gated_files import prompt_folder, read_routing
    from ..records.spul_config import read_spul_config

    kind = kind_of(folder)
    if kind in ("model", "rival"):
        return None
    names = read_routing(folder)[1]["prompts"] if kind == "gated" else ["default"]
    found = [read_spul_config(folder, subfolder=prompt_folder(name)).generic_completions for name in names]
    return found[0] if found and all(one == found[0] for one in found) else None


def _check_noted(options: EvaluateOptions) -> None:
    """Raise for options of an evidence pack that contradict each other, and a request that cannot be noted."""
    from ..records.ledger import Ledger
    from ..records.ledger_events import LedgerEvent

    if options.evidence is None:
        if options.ledger is not None or options.request is not None:
            raise ValueError("ledger and request are of an evidence pack; name its folder: --evidence DIR.")
        return
    if options.ledger is not None and options.request is None:
        raise ValueError("ledger is given without the request that the entry is of; name it: --request NAME.")
    evidence = Path(options.evidence).resolve()
    if Path(options.output_dir).resolve().is_relative_to(evidence):
        raise ValueError("output_dir is the folder of the evidence, or in it; an evidence pack has one of its own.")
    if options.request is not None:
        LedgerEvent("evaluated", options.request).to_dict()
    if options.ledger is None or options.request is None or Path(options.ledger).resolve().is_relative_to(evidence):
        return  # of the last, `check_new` says that it is none
    ledger = Ledger(options.ledger)
    ledger.check_goes_on()
    if ledger.path.exists():
        ledger.check_known(options.request)  # a slip of the pen would begin another request
    else:
        ledger.check_name(options.request)


def _write(found: Evaluation, options: EvaluateOptions) -> None:
    """Tables in print, the report, the metrics in the card of a local adapter that has one, and the evidence pack."""
    from ..evaluation.evidence import write_evidence
    from ..evaluation.report.card import add_to_card
    from ..evaluation.report.report import write_report
    from ..evaluation.report.terminal import attacks_as_text, splits_as_text
    from ..evaluation.report.verdict import verdict
    from ..records.card import CARD_NAME
    from ..records.spul_config import SPUL_CONFIG_NAME

    print("\n".join(splits_as_text(found)))
    if (said := verdict(found)) is not None:
        print(said)
    if attacks := attacks_as_text(found):
        print("\n".join(["", *attacks]))
    worded = dataclasses.replace(
        found, skipped={name: in_options(why, EvaluateOptions) for name, why in found.skipped.items()}
    )
    written = [str(path) for path in write_report(worded, options.output_dir)]
    print(f"report: {Path(options.output_dir, 'report.html')}")
    folder = Path(options.model)
    has_card = all((folder / name).is_file() for name in (CARD_NAME, SPUL_CONFIG_NAME))
    if has_card and any(one.measure == "utility" for one in found.metrics):
        add_to_card(found, folder)
        written.append(str(folder / CARD_NAME))
    print("written: " + ", ".join(written))
    if options.evidence is not None:
        digest = write_evidence(found, options.evidence, options.ledger, options.request)
        print(f"evidence: {options.evidence}, SHA-256 of the whole: {digest}")


COMMANDS = {
    "": Command(
        EvaluateOptions,
        run,
        "spul evaluate --model facebook/opt-1.3b --adapter out --forget f.jsonl --retain r.jsonl "
        "--test-forget tf.jsonl --test-retain tr.jsonl --output-dir evaluation "
        "--fail-if 'test_forget.accuracy.high > 0.05'",
        "Measure an unlearned model, attack it, and exit with status 1 where a condition holds.",
        check,
    )
}
