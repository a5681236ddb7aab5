"""`spul evaluate` on models of every kind, with conditions; and how such models are loaded."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from command_files import options_for, parsed, write_base, write_models, write_prompt, write_rows
from helpers import GENERIC, build, make_tokenizer
from small_rivals import KINDS as RIVALS
from small_rivals import rival

from spul import ForgetRetainCollator, SoftPromptUnlearner, UnlearningLayers, score_completions
from spul.commands.evaluate import run
from spul.commands.main import main
from spul.data.prompt_files import read_prompts
from spul.evaluation.evidence import evaluation_digest, verify_evidence
from spul.evaluation.harness import Requests
from spul.evaluation.loading import KINDS, kind_of, load_unlearned
from spul.evaluation.report.terminal import attacks_as_text, splits_as_text
from spul.evaluation.report.verdict import verdict
from spul.evaluation.results import Evaluation
from spul.gates import GatedUnlearner, NameGate, attach_gate
from spul.records import Ledger, LedgerEvent
from spul.records.spul_config import read_spul_config
from spul.rivals import EmbeddingCorruption, FixedRefusal, GuardrailPrompt, InContextUnlearning


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("files"))


# ---- loading ----


@pytest.mark.parametrize(
    ("name", "kind", "made"),
    [
        ("adapter", "adapter", SoftPromptUnlearner),
        ("gated", "gated", GatedUnlearner),
        ("refusal", "rival", FixedRefusal),
        ("guardrail", "rival", GuardrailPrompt),
        ("examples", "rival", InContextUnlearning),
        ("corruption", "rival", EmbeddingCorruption),
        ("layers", "layers", UnlearningLayers),
        ("lora", "adapter", None),
        ("model", "model", None),
    ],
)
def test_every_kind_of_model_is_known_by_its_files_and_loaded(files, name, kind, made):
    assert kind_of(files[name]) == kind
    loaded = load_unlearned(files[name], base=files["model"])
    assert loaded.kind == kind
    assert loaded.kind in KINDS
    assert made is None or type(loaded.model) is made
    assert not loaded.model.training
    assert len(loaded.tokenizer) == len(make_tokenizer())
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        out = loaded.model(input_ids=ids).logits
    base = build("llama")(ids).logits
    unchanged = name in ("model", "gated", "refusal", "corruption")  # gates flag no request without a name
    assert torch.equal(out[:, -7:], base) is unchanged


def test_a_folder_without_a_model_and_a_base_that_is_not_given_or_not_there_are_errors(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model; expected one of: prompts behind gates"):
        kind_of(tmp_path)
    write_prompt(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no-such-base"}))
    with pytest.raises(
        ValueError, match=r"none is given; expected .* \(its record says 'no-such-base', which nothing"
    ):
        load_unlearned(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011, transformers' own, and it may be offline
        load_unlearned(tmp_path, "no-such-base")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    record = read_spul_config(tmp_path)
    record.base_model_name_or_path = None
    record.save(tmp_path)
    with pytest.raises(ValueError, match=r"expected the base, by name or folder\.$"):
        load_unlearned(tmp_path)


def test_a_gate_that_nothing_puts_in_front_of_its_prompt_is_warned_of(files, tmp_path):
    write_prompt(tmp_path)
    NameGate(["Jane Doe"]).save(tmp_path / "gate")
    with pytest.warns(UserWarning, match=r"has a gate in gate/, and no spul_gates\.json"):
        loaded = load_unlearned(tmp_path, files["model"])
    assert loaded.kind == "adapter"
    attach_gate(NameGate(["Jane Doe"]), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has a gate in")
        assert load_unlearned(tmp_path, files["model"]).kind == "gated"


def test_a_tokenizer_with_code_of_its_own_runs_it_only_if_that_is_allowed(files, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    base = write_base(tmp_path / "base")
    (tmp_path / "base" / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    path = tmp_path / "base" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    loaded = load_unlearned(files["adapter"], base, trust_remote_code=True)
    harness = [Requests(base, adapter, trust_remote_code=True) for adapter in (files["adapter"], None)]
    assert {type(one.tokenizer).__name__ for one in (loaded, *harness)} == {"Own"}
    for load in (lambda: load_unlearned(files["adapter"], base), lambda: Requests(base)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    values = options_for(files, files["adapter"], tmp_path / "out", base=base, trust_remote_code="true")
    assert run(parsed("evaluate", values)) is None


# ---- the command ----


def test_results_report_and_card_are_written_and_conditions_decide(files, tmp_path, capsys, few_resamples):
    conditions = ["test_forget.loss.high < 0.001", "test_retain.loss.low > 1000"]
    values = options_for(files, files["adapter"], tmp_path, base=files["model"], fail_if=conditions)
    assert run(parsed("evaluate", values)) is None
    said = capsys.readouterr().out
    assert "passed: 2 condition(s)" in said
    found = Evaluation.load(tmp_path)
    assert (
        "\n".join([*splits_as_text(found), str(verdict(found)), f"report: {tmp_path / 'report.html'}", "written: "])
        in said
    )
    assert found.models == ["unlearned", "detached"]
    assert (tmp_path / "report.html").is_file()
    assert set(read_spul_config(files["adapter"]).metrics) >= {"test_forget", "test_retain"}
    loaded = load_unlearned(files["adapter"], files["model"])
    collator = ForgetRetainCollator(loaded.tokenizer, GENERIC, max_length=64)
    plain = score_completions(loaded.model, read_prompts(files["test_forget"]), collator)
    one = found.metric("utility", "test_forget", "accuracy")
    assert one.value == plain["accuracy"]
    # The same folder is resumed, and now a condition holds.
    loss = found.metric("utility", "test_forget", "loss").value
    values["fail_if"] = [f"test_forget.loss.value >= {loss}", *conditions]
    assert run(parsed("evaluate", values)) == 1
    assert f"failed: test_forget.loss.value >= {loss:g}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", RIVALS)
def test_a_method_without_training_needs_its_base_and_has_no_record_that_names_one(files, kind):
    with pytest.raises(ValueError, match=r"holds no base, and none is given; expected the base, by name or folder\.$"):
        load_unlearned(files[kind])


def test_the_base_may_be_named_model_and_what_is_on_it_adapter_as_in_other_commands(files, tmp_path, few_resamples):
    values = options_for(files, files["model"], tmp_path, adapter=files["adapter"])
    assert run(parsed("evaluate", values)) is None
    other = options_for(
        files, files["adapter"], tmp_path, base=files["model"]
    )  # the same evaluation, which is resumed
    found = Evaluation.load(tmp_path)
    assert run(parsed("evaluate", other)) is None
    assert repr(Evaluation.load(tmp_path).metrics) == repr(found.metrics)
    assert found.models == ["unlearned", "detached"]
    with pytest.raises(ValueError, match="adapter and base are both given; expected --model BASE --adapter FOLDER"):
        parsed("evaluate", {**values, "base": files["model"]})


@pytest.mark.parametrize("kind", ["examples", "corruption"])
def test_a_method_without_training_is_measured_as_any_other(files, tmp_path, kind, few_resamples):
    values = options_for(files, files[kind], tmp_path, base=files["model"], max_length=30)
    assert run(parsed("evaluate", values)) is None
    collator = ForgetRetainCollator(make_tokenizer(), GENERIC, max_length=30)
    plain = score_completions(rival(kind, build("llama")), read_prompts(files["forget"]), collator)
    assert Evaluation.load(tmp_path).metric("utility", "train_forget", "loss").value == pytest.approx(plain["loss"])


def test_a_method_of_an_unknown_name_is_refused_before_its_base_is_loaded(files, tmp_path):
    (tmp_path / "spul_rival.json").write_text('{"format_version": 1, "kind": "own"}')
    with pytest.raises(ValueError, match="kind is 'own'; expected one of fixed refusal, guardrail prompt, in-context"):
        load_unlearned(tmp_path, "no-such-base")


def test_a_request_that_a_ledger_does_not_know_is_refused_before_anything_is_measured(files, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(LedgerEvent("received", "2026-017"))
    more = {"base": files["model"], "evidence": tmp_path / "new", "ledger": ledger.path, "request": "2026-071"}
    with pytest.raises(ValueError, match="knows no request '2026-071'; did you mean '2026-017'"):
        run(parsed("evaluate", options_for(files, files["adapter"], tmp_path / "out", **more)))
    assert not (tmp_path / "out").exists()


def test_evidence_is_written_and_noted_in_the_ledger(files, tmp_path, capsys, few_resamples):
    pack, path = tmp_path / "evidence", tmp_path / "ledger.jsonl"
    more = {"base": files["model"], "evidence": pack, "ledger": path, "request": "2026-017"}
    values = options_for(files, files["adapter"], tmp_path / "out", **more)
    assert run(parsed("evaluate", {**values, "fail_if": ["test_forget.loss.value > 0"]})) == 1  # a failure, too
    assert verify_evidence(pack, path) == []
    assert f"SHA-256 of the whole: {evaluation_digest(pack)}" in capsys.readouterr().out
    state = Ledger(path).states()["2026-017"]
    record = read_spul_config(files["adapter"])
    assert (state.evaluation, state.prompt_sha256) == (evaluation_digest(pack), record.weights_sha256)
    with pytest.raises(FileExistsError, match="evidence is not written over"):
        run(parsed("evaluate", values))
    assert len(Ledger(path).entries()) == 1


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"ledger": "ledger.jsonl"}, ValueError, "name its folder: --evidence DIR"),
        ({"request": "1"}, ValueError, "name its folder: --evidence DIR"),
        ({"evidence": "{}/out"}, ValueError, "is the folder of the evidence, or in it"),
        ({"evidence": "{}"}, ValueError, "is the folder of the evidence, or in it"),
        ({"evidence": "{}/full"}, FileExistsError, "is not empty"),
        ({"evidence": "{}/file"}, FileExistsError, "is a file"),
        ({"evidence": "{}/file/new"}, FileExistsError, "is a file"),
        ({"evidence": "{}/new", "request": " "}, ValueError, "expected the name of a request"),
        ({"evidence": "{}/new", "ledger": "{}/ledger.jsonl"}, ValueError, "given without the request"),
        ({"evidence": "{}/new", "ledger": "{}/full/note.txt", "request": "1"}, ValueError, "is no entry of a ledger"),
        (
            {"evidence": "{}/empty", "ledger": "{}/empty/ledger.jsonl", "request": "1"},
            ValueError,
            "expected it elsewhere",
        ),
        (
            {"evidence": "{}/new", "ledger": "{}/none/ledger.jsonl", "request": "1"},
            FileNotFoundError,
            "there is no folder",
        ),
    ],
)
def test_evidence_that_cannot_be_written_is_refused_before_anything_is_measured(files, tmp_path, more, error, message):
    (tmp_path / "file").touch()
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine\n")
    more = {name: value.format(tmp_path) for name, value in more.items()}
    with pytest.raises(error, match=message):
        run(parsed("evaluate", options_for(files, files["adapter"], tmp_path / "out", **more)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "base", "retrained", "reference"])
def test_results_have_a_folder_of_their_own_that_is_no_models(files, tmp_path, name):
    values = {**options_for(files, "no-model", tmp_path / "new" / ".." / "out"), name: tmp_path / "out"}
    with pytest.raises(ValueError, match=r"out is the folder of a model, .* such as .*out-evaluation"):
        run(parsed("evaluate", values))
    assert not (tmp_path / "out").exists()


def test_attacks_are_chosen_by_name_and_stand_in_a_table_at_the_end(files, tmp_path, capsys, few_resamples):
    more = {"measures": ["input-attack"], "attacks": ["capitals", "diluted"], "attack_rows": 2}
    values = options_for(files, files["model"], tmp_path, **more)
    assert run(parsed("evaluate", values)) is None
    loaded = Evaluation.load(tmp_path)
    found = loaded.metrics
    assert {(one.attack, one.level) for one in found} == {("none", None), ("capitals", None), ("diluted", 1)}
    said = capsys.readouterr().out.split("\n")
    table = attacks_as_text(loaded)
    assert said[1 : 2 + len(table)] == ["", *table]
    assert [line.split("  ")[0] for line in table] == ["attack", "capitals", "diluted, 1 turn"]
    values = options_for(files, files["model"], tmp_path / "other", **{**more, "attacks": ["paraphrase"]})
    with pytest.raises(ValueError, match=r"--attacks: 'paraphrase' is not known; expected one of capitals"):
        run(parsed("evaluate", values))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attacks": ["nope"]}, "--attacks: 'nope' is not known; expected one of capitals"),
        ({"attacks": ["capital"]}, r"--attacks: 'capital' is not known; did you mean capitals\?"),
        ({"attacks": ["capitals"]}, "attacks are given, and 'input attack' is none of the measures"),
        ({"measures": ["usefulness"]}, "--measures: 'usefulness' is not known"),
    ],
)
def test_names_of_attacks_and_measures_are_checked_before_anything_is_loaded(files, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(parsed("evaluate", options_for(files, str(tmp_path / "no-model"), tmp_path / "out", **more)))


def test_a_missing_matplotlib_is_found_before_anything_is_loaded(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install"):
        run(parsed("evaluate", options_for(files, str(tmp_path / "no-model"), tmp_path / "out")))


def test_whole_weights_are_measured_beside_their_base(files, tmp_path, few_resamples):
    edited = build("llama")
    with torch.no_grad():
        edited.lm_head.weight.mul_(-1)
    edited.save_pretrained(tmp_path / "edited")
    make_tokenizer().save_pretrained(tmp_path / "edited")
    others = {"base": files["model"], "retrained": files["model"], "measures": ["utility", "kl"]}
    assert run(parsed("evaluate", options_for(files, str(tmp_path / "edited"), tmp_path / "out", **others))) is None
    found = Evaluation.load(tmp_path / "out")
    assert found.models == ["unlearned", "detached", "retrained"]
    assert found.metric("kl", "test_retain", "reverse_kl").value > 0.1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"fail_if": ["accuracy"]}, "cannot be read"),
        ({"fail_if": ["kl: test_retain.reverse_kl.high > 1"]}, "of a measure that is not taken"),
        ({"fail_if": ["test_forget.acuracy.high > 1"]}, "no metric 'acuracy'; expected such as accuracy"),
        ({"fail_if": ["tests_forget.accuracy.high > 0.5"]}, "of no set of rows; expected one of .*test_forget"),
        (
            {"fail_if": ["input attack: train_forget.accuracy.high > 0.2"], "measures": ["input attack"]},
            r"of no set of rows; expected one of test_forget, test_retain\.",
        ),
        (
            {"fail_if": ["membership: train_forget.accuracy.high > 0.6"], "measures": ["membership"]},
            "of a metric that 'membership' has not; expected one of auc, true_positive_rate",
        ),
    ],
)
def test_conditions_and_measures_that_are_none_are_errors_before_the_base_is_loaded(files, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(parsed("evaluate", options_for({**files, "model": "no-base"}, files["model"], tmp_path, **more)))


def test_the_whole_program_exits_with_the_condition(files, tmp_path, capsys, few_resamples):
    settings = tmp_path / "c.yaml"
    values = options_for(files, files["model"], str(tmp_path / "out"))
    settings.write_text(json.dumps({**values, "fail_if": "test_retain.loss.value > 0"}))  # JSON is YAML
    assert main(["evaluate", "--config", str(settings)]) == 1
    assert main(["evaluate", "--config", str(settings), "--fail-if", "test_retain.loss.value > 1000"]) == 0
    missing = write_rows(tmp_path / "none.jsonl", [])
    assert main(["evaluate", "--config", str(settings), "--forget", missing]) == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -3), ("max_new_tokens", 0)])
def test_sizes_below_1_are_refused_before_anything_is_written(files, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is {value}; expected a number of at least 1"):
        run(
            parsed(
                "evaluate",
                options_for(files, files["adapter"], tmp_path / "out", base=files["model"], **{name: value}),
            )
        )
    assert not (tmp_path / "out").exists()
