"""TOFU on a small chat model: a prefix with fitted keys, LoRA, a gate with a refusal or a prompt behind it.

    python examples/evidence_tofu.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data-dir ../shared/data/tofu

The base learns the forget rows (40 in forget01, 200 in forget05) and `--retain-rows` others until it gives its
answers a mean probability of 0.9; the retrained model learns the others alone, for as many epochs. Unlearning sees
all forget rows and all retain rows but `--unseen-retain`, on which retaining is scored. The settings are the
library's defaults; nothing is chosen.

A line of `tofu.jsonl` has a system's scores by question: probability, ROUGE-L recall and both truth ratios of forget,
retain, real authors and world facts; probability of paraphrased forget questions; likelihoods of forget rows and of
rows that nobody learned, for membership; its answers to forget rows and to retain rows. A repeated command resumes.
Where the file has the base's answers, those of the gate and its refusal are computed from them, without the base.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence.tofu import TOKENS, Tofu, trained_parameters
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, set_seed

from spul import SoftPromptUnlearner, UnlearningLoss
from spul.data.dataset import forget_retain_dataset
from spul.data.formats import REFUSALS
from spul.evaluation.metrics import (
    forget_quality,
    generate_answers,
    model_utility,
    probability,
    response_likelihoods,
    rouge_l,
    score_questions,
)
from spul.evaluation.metrics.likelihood import extraction_strength, mean_log_probs
from spul.gates import GatedUnlearner, TextGate, hard_negatives, load, prompt_texts
from spul.losses import CrossEntropy
from spul.losses.terms import Reduction
from spul.prompts import DiscriminativeStart
from spul.prompts.configs import prompt_config
from spul.rivals import FixedRefusal
from spul.training.methods import unlearning_method
from spul.training.rates import default_learning_rate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="Hub name or folder of a causal LM with a chat template")
    add("--data-dir", required=True, type=Path, help="folder of TOFU's files")
    add("--forget-set", choices=("forget01", "forget05", "forget10"), default="forget01")
    add("--retain-rows", type=int, default=100, help="of the 400 with false answers, those that the base learns")
    add("--unseen-retain", type=int, default=40, help="those of them that unlearning does not see, to be scored")
    add("--other-questions", type=int, default=20, help="of real authors and of world facts, each")
    add("--steps", type=int, default=150, help="of unlearning")
    add("--batch-size", type=int, default=8)
    add("--memorize-lr", type=float, default=1e-3)
    add("--memorize-epochs", type=int, default=12, help="at most")
    add("--lora-lr", type=float, default=1e-3, help="of unlearning by LoRA; SST-2's choice on this model by default")
    add("--recall", type=float, default=0.99, help="of the gate on its training rows")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME", help=", ".join(SYSTEMS))
    add("--seed", type=int, default=1)
    add("--output-dir", type=Path, default=Path("out/tofu"))
    return parser.parse_args()


# ---- systems ----


def vanilla(tofu: Tofu) -> Any:
    return AutoModelForCausalLM.from_pretrained(tofu.args.model, dtype=torch.float32).eval().to(tofu.device)


def base(tofu: Tofu) -> Any:
    return tofu.load()


def retrained(tofu: Tofu) -> Any:
    return tofu.load("retrained")


def prefix(tofu: Tofu, name: str = "prefix", reduction: Reduction = "sum") -> Any:
    """The prompt that `spul train` made by default: its forget loss is a sum over a refusal's tokens."""

    def make(folder: Path) -> dict[str, Any]:
        set_seed(tofu.args.seed)
        start = DiscriminativeStart(tofu.dataset, tofu.collator, progress=False)
        loss = UnlearningLoss(alpha=4.0, forget=CrossEntropy(reduction=reduction))
        model = SoftPromptUnlearner(tofu.load(), prompt_config("prefix_tuning", 30), loss, start=start)
        tofu.train(model, loss, tofu.dataset, default_learning_rate(model, start), 0.5).save_pretrained(folder)
        return {"parameters": trained_parameters(model)}

    folder = tofu.made_in(name, {"alpha": 4.0, "tokens": 30}, make)
    return SoftPromptUnlearner.from_pretrained(tofu.load(), folder).eval()


def prefix_of_means(tofu: Tofu) -> Any:
    """The same, its forget loss a mean as its retain loss is, and as it is by default since."""
    return prefix(tofu, "prefix-mean", "mean")


def gate_of(tofu: Tofu) -> TextGate:
    sides = (prompt_texts(rows, tofu.collator.encoder) for rows in (tofu.forget, tofu.retain))
    return TextGate.fit(*sides, recall=tofu.args.recall)


def gated(tofu: Tofu) -> Any:
    """A prefix behind a text gate, trained on forget rows and on the retain rows that the gate nearly flags."""

    def make(folder: Path) -> dict[str, Any]:
        gate = gate_of(tofu)
        near = hard_negatives(gate, tofu.retain, len(tofu.retain) // 2)
        columns = ["prompt", "completion", "question"]
        dataset = forget_retain_dataset(tofu.forget.select_columns(columns), near.select_columns(columns))
        set_seed(tofu.args.seed)
        loss = UnlearningLoss(alpha=0.05, beta=0.025)
        model = SoftPromptUnlearner(tofu.load(), prompt_config("prefix_tuning", 30), loss)
        tofu.train(model, loss, dataset, 0.3 * default_learning_rate(model), 0.6).save_pretrained(folder / "prompt")
        gate.save(folder / "gate")
        return {"parameters": trained_parameters(model)}

    folder = tofu.made_in("gated", {"recall": tofu.args.recall, "rate": 0.3, "alpha": 0.05}, make)
    model = tofu.load()
    prompt = SoftPromptUnlearner.from_pretrained(model, folder / "prompt")
    return GatedUnlearner(prompt, tofu.tokenizer, {"default": load(folder / "gate", model, tofu.tokenizer)}).eval()


def refusal(tofu: Tofu) -> Any:
    return FixedRefusal(tofu.load(), tofu.tokenizer, gate_of(tofu), tofu.collator.generic_completions[0])


def idk_lora(tofu: Tofu) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        set_seed(tofu.args.seed)
        method = unlearning_method("IDK", trainable="lora")
        learning = method.prepare(tofu.load())
        parameters = trained_parameters(learning)
        tofu.train(learning, method.loss, tofu.dataset, tofu.args.lora_lr, 0.5).save_pretrained(folder)
        return {"parameters": parameters}

    folder = tofu.made_in("idk-lora", {"lr": tofu.args.lora_lr}, make)
    return PeftModel.from_pretrained(tofu.load(), folder).eval()


REFUSAL, GATED, LORA = "gate and refusal", "SPUL behind a gate", "IDK, LoRA"
OWN_OPTIONS = {REFUSAL: ("recall",), GATED: ("recall",), LORA: ("lora_lr",)}
SYSTEMS: dict[str, Callable[[Tofu], Any]] = {
    "vanilla": vanilla,
    "base": base,
    "retrained": retrained,
    "SPUL, prefix with fitted keys": prefix,
    "SPUL, prefix, mean forget loss": prefix_of_means,
    GATED: gated,
    REFUSAL: refusal,
    LORA: idk_lora,
}


# ---- scores ----


def rounded(values: Any) -> list[float]:
    return np.asarray(values, dtype=float).round(5).tolist()


def scores(tofu: Tofu, model: Any) -> dict[str, Any]:
    """Scores by question, and answers."""
    encoder = tofu.collator.encoder
    found: dict[str, Any] = {}
    if not isinstance(model, FixedRefusal):  # whose answers have no likelihoods to compare
        found["questions"] = {}
        for name, questions in tofu.questions.items():
            each = score_questions(model, questions, encoder, tofu.format, max_new_tokens=TOKENS, progress=name)
            found["questions"][name] = {key: rounded(values) for key, values in each.items()}
        for name, rows in (("forget", tofu.forget), ("never learned", tofu.never_learned)):
            likelihoods = response_likelihoods(model, rows, encoder)
            found[name] = {"mean_log_prob": rounded(mean_log_probs(likelihoods))}
            found[name]["extraction_strength"] = rounded(extraction_strength(likelihoods))
        likelihoods = response_likelihoods(model, tofu.in_other_words, encoder)
        found["in other words"] = {"probability": rounded(probability(likelihoods))}
        if isinstance(model, SoftPromptUnlearner | GatedUnlearner):
            with model.disable_adapter():
                likelihoods = response_likelihoods(model, tofu.forget, encoder)
            found["disabled"] = {"probability": rounded(probability(likelihoods))}
    found["answers"] = {
        side: generate_answers(model, rows, encoder, max_new_tokens=TOKENS) for side, rows in tofu.answered.items()
    }
    found["answers_rouge"] = {
        side: rounded(rouge_l(answers, tofu.answered[side]["completion"])["rouge_l_recall"])
        for side, answers in found["answers"].items()
    }
    return found


def refused(tofu: Tofu, answers: dict[str, list[str]]) -> dict[str, Any]:
    """Answers of a gate and its refusal from those of the base, which it gives where the gate does not flag."""
    gate, text = gate_of(tofu), tofu.collator.generic_completions[0].strip()
    found: dict[str, Any] = {"report": str(gate.report), "answers": {}, "answers_rouge": {}}
    for side, rows in tofu.answered.items():
        flags = gate.flags(prompt_texts(rows, tofu.collator.encoder))
        given = [text if flag else answer for flag, answer in zip(flags, answers[side], strict=True)]
        found["answers"][side] = given
        found["answers_rouge"][side] = rounded(rouge_l(given, rows["completion"])["rouge_l_recall"])
    return found


def summary(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of systems: forget and retain questions, model utility, forget quality, membership."""
    head = ["", "forget: probability", "in other words", "ROUGE-L", "extraction strength", "declined"]
    head += ["retain: probability", "ROUGE-L", "declined", "utility", "forget quality, arithmetic", "geometric"]
    rows = [[*head, "membership, AUC"], ["---", *["---:"] * len(head)]]
    refusals = {text.strip() for text in REFUSALS}
    theirs = next((one["questions"]["forget"] for one in lines if one["system"] == "retrained"), None)
    for line in lines:
        declined = {
            side: np.mean([text.strip() in refusals for text in answers]) for side, answers in line["answers"].items()
        }
        rouge = {side: np.mean(values) for side, values in line["answers_rouge"].items()}
        cells: list[Any] = [line["system"]] + [None] * len(head)
        cells[3], cells[5], cells[7], cells[8] = (
            rouge["forget"],
            declined["forget"],
            rouge["retain"],
            declined["retain"],
        )
        if "questions" in line:
            sets = {
                name: {key: np.array(values) for key, values in each.items()}
                for name, each in line["questions"].items()
            }
            cells[1], cells[6] = sets["forget"]["probability"].mean(), sets["retain"]["probability"].mean()
            cells[2] = np.mean(line["in other words"]["probability"])
            cells[4] = np.mean(line["forget"]["extraction_strength"])
            cells[9] = model_utility(*(sets[name] for name in ("retain", "real_authors", "world_facts")))[
                "model_utility"
            ]
            if theirs is not None and line["system"] != "retrained":
                for i, name in ((10, "truth_ratio"), (11, "truth_ratio_geometric")):
                    cells[i] = forget_quality(sets["forget"][name], np.array(theirs[name]))
            seen = line["forget"]["mean_log_prob"], line["never learned"]["mean_log_prob"]
            cells[12] = roc_auc_score([1] * len(seen[0]) + [0] * len(seen[1]), [*seen[0], *seen[1]])
        rows.append(
            [cells[0], *("" if one is None else f"{one:.2g}" if 0 < one < 0.01 else f"{one:.2f}" for one in cells[1:])]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tofu, path = Tofu(args), args.output_dir / "tofu.jsonl"
    for name in ("base", "retrained"):
        tofu.is_memorized(name)  # refuses those of other settings before anything is measured
    facts = {"seed": args.seed, "steps": args.steps, **tofu.learned_from}
    facts |= {"unseen_retain": args.unseen_retain, "other_questions": args.other_questions}
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name in args.systems:
        own = {"system": name} | {option: getattr(args, option) for option in OWN_OPTIONS.get(name, ())}
        if any({**one, **facts, **own} == one for one in done):
            continue
        begun = time.perf_counter()
        of_base = next((one["answers"] for one in done if {**one, **facts, "system": "base"} == one), None)
        if name == REFUSAL and of_base is not None:
            found = refused(tofu, of_base)
        else:
            found = scores(tofu, SYSTEMS[name](tofu))
        line = facts | own | found | {"seconds": time.perf_counter() - begun}
        done.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        forget = line.get("questions", {}).get("forget", {})
        print(name, {key: round(float(np.mean(values)), 3) for key, values in forget.items()}, flush=True)
        print(
            [round(float(np.mean(values)), 3) for values in line["answers_rouge"].values()],
            line["answers"]["forget"][:5],
        )
        gc.collect()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    print(summary([line for line in lines if {**line, **facts} == line]))


if __name__ == "__main__":
    main()
