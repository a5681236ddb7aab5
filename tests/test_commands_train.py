"""`spul train`: from files to a saved prompt with its card."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.integrations.integration_utils as integrations
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from command_files import SHORT, flags, parsed, trained, write_base, write_files, write_rows
from helpers import CHAT_TEMPLATE, GENERIC, build, make_collator, make_tokenizer, rows
from huggingface_hub import ModelCard
from peft import PeftModel
from processes import run_by_two
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

import spul
from spul import SoftPromptUnlearner, UnlearningTrainer, forget_retain_dataset
from spul.commands import train
from spul.commands.main import main
from spul.data.prompt_files import read_prompts
from spul.models.compat import is_quantized
from spul.prompts import DiscriminativeStart, NearStart, starts
from spul.prompts.configs import prompt_config
from spul.records import Ledger, LedgerEvent, fingerprint, make_digest_key
from spul.records.spul_config import read_spul_config

LOGS: list[dict[str, float]] = []


class Tracker(TrainerCallback):
    """Keeps what a tracker would be told."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        LOGS.append(dict(logs))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def test_files_become_a_prompt_with_record_scores_and_card(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "fake", Tracker)
    LOGS.clear()
    options = trained(files, tmp_path, report_to="fake", logging_steps=1)
    loaded = SoftPromptUnlearner.from_pretrained(files["model"], tmp_path)
    assert loaded.active_peft_config.num_virtual_tokens == 4
    record = read_spul_config(tmp_path)
    assert (record.forget.rows, record.retain.rows) == (6, 8)
    assert record.generic_completions == GENERIC
    sides = ("test_forget", "test_retain")
    assert set(record.metrics) == {*sides, *(f"{side}, detached" for side in sides)}
    card = (tmp_path / "README.md").read_text()
    assert all(f"| {name} | {values['accuracy']:.4f} |" in card for name, values in record.metrics.items())
    assert ModelCard(card).data.base_model == Path(files["model"]).name
    said = capsys.readouterr().out
    before, after = (record.metrics[name]["accuracy"] for name in ("test_forget, detached", "test_forget"))
    assert f"test_forget: accuracy {after:.3f} (base {before:.3f})" in said
    assert "start: discriminative, keys fitted to the rows\n" in said
    steps = [logs for logs in LOGS if "loss" in logs]
    assert len(steps) == 3, "the tracker gets every step's terms"
    assert all({"loss", "forget_loss", "retain_loss", "kl_loss", "learning_rate"} <= logs.keys() for logs in steps)
    assert (options.prompt_type, options.start, options.alpha) == ("prefix_tuning", "discriminative", 4.0)
    assert options.learning_rate == 0.1  # the highest: the base is 32 wide
    PeftModel.from_pretrained(build("llama"), tmp_path)  # and plain PEFT loads it


def test_rows_that_the_base_does_not_know_are_warned_of(files, tmp_path, capsys):
    base, tokenizer = build("llama").eval(), make_tokenizer()
    prompt = rows("doe", 1)[0]["prompt"]
    with torch.no_grad():
        answer = int(base(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())
    unknown, known = (tokenizer.decode([token]) for token in (answer - 1, answer))
    for name, completion in (("test_forget", unknown), ("test_retain", known)):
        files = {**files, name: write_rows(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "completion": completion}])}
    trained(files, tmp_path / "out")
    said = capsys.readouterr().out
    assert "(base 1.000)" in said
    assert "warning: test_forget: the base answers none of these rows" in said
    assert "warning: test_retain" not in said


def test_the_trained_prompt_is_noted_in_the_ledger(files, tmp_path):
    path = tmp_path / "ledger.jsonl"
    trained(files, tmp_path / "out", ledger=path, request="2026-017")
    (entry,) = Ledger(path).entries()
    record = read_spul_config(tmp_path / "out")
    assert (entry.event, entry.request, entry.fields["rows"]["rows"]) == ("trained", "2026-017", 6)
    assert entry.fields["prompt_sha256"] == record.weights_sha256
    assert entry.fields["base_fingerprint"] == record.base_fingerprint == fingerprint(build("llama"))


def test_a_request_that_is_revoked_while_its_prompt_is_trained_stays_so_and_the_prompt_is_saved(
    files, tmp_path, monkeypatch, capsys
):
    ledger, train = Ledger(tmp_path / "ledger.jsonl"), UnlearningTrainer.train
    for event in ("received", "revoked"):
        ledger.append(LedgerEvent(event, "1"))

    def train_and_revoke(self, **kwargs):
        train(self, **kwargs)
        for event in ("received", "revoked"):
            Ledger(ledger.path).append(LedgerEvent(event, "1"))

    monkeypatch.setattr(UnlearningTrainer, "train", train_and_revoke)
    says = (
        rf"{tmp_path / 'out'} is saved, but not noted: the request '1' was revoked on 2.*--event trained --request 1"
    )
    with pytest.raises(ValueError, match=says):
        trained(files, tmp_path / "out", ledger=ledger.path, request="1")
    assert ledger.states()["1"].revoked is not None
    said = capsys.readouterr().out
    assert "test_forget: accuracy " in said
    assert said.endswith(f"saved: {tmp_path / 'out'}\n")
    monkeypatch.undo()
    trained(files, tmp_path / "anew", ledger=ledger.path, request="1")  # begun after the withdrawal
    assert ledger.states()["1"].revoked is None
    ledger.append(LedgerEvent.of_adapter("trained", "1", tmp_path / "out"))  # by hand: the prompt is whole


def test_the_prompt_is_uploaded_with_its_scores_if_asked_for(files, tmp_path, monkeypatch):
    pushed = []

    def push(trainer):
        pushed.append(read_spul_config(trainer.args.output_dir).metrics)

    monkeypatch.setattr(UnlearningTrainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(UnlearningTrainer, "push_to_hub", push)
    trained(files, tmp_path / "pushed", push_to_hub="true")
    trained(files, tmp_path / "kept")
    sides = ("test_forget", "test_retain")
    assert [set(metrics) for metrics in pushed] == [{*sides, *(f"{side}, detached" for side in sides)}]


def test_the_same_training_in_code_makes_the_same_prompt(files, tmp_path):
    settings = {"prompt_type": "prefix_tuning", "start": "random", "alpha": 0.7, "beta": 0.2, "forget_fraction": 0}
    options = trained(files, tmp_path / "cli", **settings, seed=5)
    base = build("llama")
    set_seed(5)
    loss = spul.UnlearningLoss(alpha=0.7, beta=0.2)
    unlearner = SoftPromptUnlearner(base, prompt_config("prefix_tuning", 4), loss=loss)
    collator = spul.ForgetRetainCollator(make_tokenizer(), GENERIC, max_length=92, seed=5)
    sets = [read_prompts(files[name]) for name in ("forget", "retain")]
    again = parsed("train", {**files, "generic": GENERIC, "output_dir": tmp_path / "code", **SHORT, "seed": 5})
    again.learning_rate = options.learning_rate
    spul.UnlearningTrainer(unlearner, again, collator, spul.forget_retain_dataset(*sets)).train()
    unlearner.save_pretrained(str(tmp_path / "code"))
    found = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cli", "code")]
    assert found[0] == found[1]


def test_two_processes_train_and_note_what_one_does(files, tmp_path):
    # One step of rows in order, whose rows and update are those of one process.
    more = {
        "train_sampling_strategy": "sequential",
        "max_steps": 1,
        "warmup_steps": 0,
        "optim": "sgd",
        "max_grad_norm": 0,
    }
    more |= {"prompt_type": "prompt_tuning", "request": "17", "save_strategy": "steps", "save_steps": 1}
    trained(files, tmp_path / "one", ledger=tmp_path / "one.jsonl", per_device_train_batch_size=8, **more)
    values = {**files, **SHORT, **more, "generic": GENERIC, "output_dir": tmp_path / "two"}
    values |= {"ledger": tmp_path / "two.jsonl", "per_device_train_batch_size": 4}
    said = run_by_two("-m", "spul", "train", *flags(values))
    assert said.count("saved: ") == said.count("test_forget: accuracy ") == 1
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-6)
    one, two = (read_spul_config(tmp_path / name) for name in ("one", "two"))
    assert (two.forget, two.retain, two.loss) == (one.forget, one.retain, one.loss)
    for name, scores in one.metrics.items():
        assert two.metrics[name] == pytest.approx(scores, abs=1e-4)
    assert [entry.event for entry in Ledger(tmp_path / "two.jsonl").entries()] == ["trained"]
    assert Ledger(tmp_path / "two.jsonl").states()["17"].prompt_sha256 == two.weights_sha256


def test_a_folder_with_a_model_is_refused_into_which_the_prompt_would_be_loaded(files, tmp_path):
    shutil.copytree(files["model"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(FileExistsError, match="holds a model, into which transformers would load the prompt"):
        trained(files, tmp_path)
    with pytest.raises(FileExistsError, match="holds a model"):
        trained(files, tmp_path / "new" / "..")
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_base_may_be_quantized(files, tmp_path, bits, capsys):
    pytest.importorskip("bitsandbytes")
    options = trained(files, tmp_path, bits=bits)
    assert f"saved: {tmp_path}" in capsys.readouterr().out
    base = options.load(files["model"])
    assert is_quantized(base)
    record = read_spul_config(tmp_path)
    assert record.base_fingerprint == fingerprint(base) != fingerprint(build("llama"))
    assert record.metrics
    with pytest.raises(ValueError, match="--bits is 3; expected 8 or 4"):
        trained(files, tmp_path / "other", bits=3)


@pytest.mark.parametrize("given", [(), ("test_forget",), ("test_retain",), ("test_forget", "test_retain")])
def test_what_is_not_known_without_rows_to_test_with_is_said_and_what_measures_it(files, tmp_path, capsys, given):
    values = {name: path for name, path in files.items() if not name.startswith("test_") or name in given}
    trained(values, tmp_path / "out", start="random", max_steps=1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not known: ")]
    for name in ("test_forget", "test_retain"):
        assert any(f"without --{name.replace('_', '-')}" in line for line in said) is (name not in given)
    command = f"spul evaluate --model {files['model']} --adapter {tmp_path / 'out'} measures both"
    assert [command in line for line in said] == [True] * (len(given) < 2)


def test_held_out_rows_stop_it_and_choose_the_best(files, tmp_path, capsys):
    trained(files, tmp_path, hold_out=0.34, stop_every=1, stop_margin=50, stop_target=99, stop_patience=0)
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    assert any("held_out_forget_accuracy" in one for one in state["log_history"])
    said = capsys.readouterr().out
    found = re.search(r"^held out: forget accuracy (\S+) \(base .*, retain accuracy (\S+) \(base", said, re.MULTILINE)
    scored = [one for one in state["log_history"] if "held_out_forget_accuracy" in one]
    pairs = [tuple(f"{one[f'held_out_{side}_accuracy']:.3f}" for side in ("forget", "retain")) for one in scored]
    assert found is not None
    assert found.groups() in pairs
    assert "not known: " not in said
    assert read_spul_config(tmp_path).forget.rows == 4  # of six, two are held out


def test_conversations_are_trained_before_their_message(tmp_path):
    def chats(name):
        return [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"].strip()},
                ]
            }
            for row in rows(name, 4)
        ]

    sets = {
        name: write_rows(tmp_path / f"{name}.jsonl", chats(who))
        for name, who in (("forget", "jane"), ("retain", "film"))
    }
    base = write_base(tmp_path / "base", chat=True)
    key = str(make_digest_key(tmp_path / "key"))
    trained({"model": base, **sets}, tmp_path / "out", prompt_position="message", digest_key=key)
    loaded = SoftPromptUnlearner.from_pretrained(base, tmp_path / "out")
    assert loaded.spul_config.prompt_position == "message"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) is not None
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    # And the ledger's entry of the same file by hand has the record's digest.
    said = ["ledger", "add", "--ledger", str(tmp_path / "ledger.jsonl"), "--event", "received", "--request", "1"]
    assert main([*said, "--rows", sets["forget"], "--digest-key", key]) == 0
    assert Ledger(tmp_path / "ledger.jsonl").states()["1"].rows == loaded.spul_config.forget


def test_a_prefix_begins_as_keys_fitted_to_the_rows(files, tmp_path):
    options = {"prompt_type": "prefix_tuning", "learning_rate": 1e-8}  # so that training changes next to nothing
    states = {}
    for start in ("random", "discriminative"):
        trained(files, tmp_path / start, start=start, **options)
        states[start] = load_file(tmp_path / start / "adapter_model.safetensors")["prompt_embeddings"]
    base = SoftPromptUnlearner.from_pretrained(files["model"], tmp_path / "random").get_base_model()
    collator = make_collator(max_length=92)
    dataset = forget_retain_dataset(*(read_prompts(files[name]) for name in ("forget", "retain")))
    set_seed(42)
    start = DiscriminativeStart(dataset, collator, progress=False)
    expected = SoftPromptUnlearner(base, prompt_config("prefix_tuning", 4), start=start)
    torch.testing.assert_close(states["discriminative"], expected.prompt_encoder["default"].embedding.weight.detach())
    assert not torch.allclose(states["random"], states["discriminative"], atol=0.01)


def test_a_prompt_begins_as_the_draw_nearest_to_the_base_on_the_rows(files, tmp_path, capsys):
    trained(files, tmp_path, prompt_type="prompt_tuning", learning_rate=1e-8)
    found = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    dataset = forget_retain_dataset(*(read_prompts(files[name]) for name in ("forget", "retain")))
    base = build("llama")
    set_seed(42)
    start = NearStart(dataset, make_collator(max_length=92))
    expected = SoftPromptUnlearner(base, prompt_config("prompt_tuning", 4), start=start)
    said = capsys.readouterr().out
    assert said.startswith(f"start: near, {start.distance:.2f} nats per response token from the base\n")
    torch.testing.assert_close(found, expected.prompt_encoder["default"].embedding.weight.detach())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"instruction": "decline", "start": "random"}, "give one of them"),
        ({"instruction": " ", "model": "no-base"}, "--instruction is blank"),
        ({"start": "discriminative", "prompt_type": "p_tuning"}, "--prompt-type p_tuning has none"),
        ({"completion_template": "{{completion}}"}, "completion_template goes with prompt_template, .* give both"),
        ({"stop_every": 5}, "--stop-every is 5, of no effect without --hold-out 0.1"),
        ({"stop_margin": 2}, "--stop-margin is 2.0, of no effect without --hold-out 0.1"),
        ({"encoder_hidden_size": 64}, "--encoder-hidden-size is 64, of no effect without --prompt-type p_tuning"),
        ({"request": "2026-017"}, "--ledger and --request go together"),
        ({"ledger": "ledger.jsonl"}, "--ledger and --request go together"),
        ({"ledger": "{}/ledger.jsonl", "request": " "}, "expected the name of a request"),
        ({"ledger": "{}/ledger.jsonl", "request": "2026/017"}, "its name is that of its prompt where it is served"),
        ({"ledger": "{}/note.txt", "request": "2026-017"}, "is no entry of a ledger"),
        ({"method": "NOPE"}, "--method: 'NOPE' is not known; expected one of SPUL, GA"),
        ({"method": "RMU"}, "--method: 'RMU' is not known"),
        (
            {"num_virtual_tokens": 95},
            "96 positions; a prompt of 95 virtual tokens leaves 1 .*--num-virtual-tokens",
        ),
        (
            {"prompt_type": "p_tuning", "encoder_hidden_size": 0},
            "--encoder-hidden-size is 0",
        ),
        ({"max_length": 93}, "4 virtual tokens exceed the base's 96 positions; expected --max-length 92 at most"),
        ({"output_dir": "{}/note.txt", "model": "no-base"}, "note.txt' is a file"),
        ({"hold_out": 2}, "--hold-out is 2.0; expected a share"),
        ({"prompt_position": "message"}, "text_field"),
    ],
)
def test_options_that_contradict_each_other_are_refused(files, tmp_path, more, message):
    (tmp_path / "note.txt").write_text("mine\n")
    more = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in more.items()}
    with pytest.raises((ValueError, TypeError, FileExistsError), match=message):
        trained(files, more.pop("output_dir", tmp_path), **more)
    assert not any(tmp_path.glob("*.safetensors"))


def test_a_bad_row_is_one_line_with_file_and_row_and_status_2(files, tmp_path, capsys):
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": ""}])
    arguments = ["train", "--model", files["model"], "--forget", bad, "--retain", files["retain"]]
    assert main([*arguments, "--generic", " unknown", "--output-dir", str(tmp_path / "out"), "--use-cpu", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("spul train: ")
    assert "bad.jsonl, row 2" in line
    assert (
        main([*arguments[:-4], "--forget", files["forget"], *arguments[-2:], "--output-dir", str(tmp_path / "out")])
        == 2
    )
    assert "--generic ' neutral' ' unknown'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, ("prefix_tuning", "discriminative", 4.0, 0.5)),
        ({"prompt_position": "message"}, ("prompt_tuning", "near", None, 0.5)),
        ({"instruction": "Decline."}, ("prefix_tuning", None, None, 0.5)),
        ({"start": "random"}, ("prefix_tuning", "random", None, 0.5)),
        ({"alpha": 1.0, "forget_fraction": 0}, ("prefix_tuning", "discriminative", 1.0, 0.0)),
        ({"retain_budget": 0.02}, ("prefix_tuning", "discriminative", None, 0.5)),
        ({"method": "NPO+GD"}, ("prefix_tuning", "discriminative", None, 0.5)),
        ({"prompt_type": "cartridge"}, ("cartridge", "near", None, 0.5)),
        ({"prompt_type": "p_tuning"}, ("p_tuning", "near", None, 0.5)),
        ({"train_sampling_strategy": "sequential"}, ("prefix_tuning", "discriminative", 4.0, None)),
    ],
)
def test_defaults_that_depend_on_other_options_leave_those_that_are_given(given, found, files):
    options = parsed("train", {**files, "generic": GENERIC, "output_dir": "out", **SHORT, **given})
    train._fill(options)
    assert (options.prompt_type, options.start, options.alpha, options.forget_fraction) == found


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning", "p_tuning", "cartridge"])
def test_no_start_is_chosen_that_reads_rows_where_zero3_loads_the_base_in_shards(kind, files, monkeypatch, caplog):
    options = parsed("train", {**files, "generic": GENERIC, "output_dir": "out", **SHORT, "prompt_type": kind})
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    options.deepspeed_plugin, options.hf_deepspeed_config = SimpleNamespace(hf_ds_config=config), config
    train._fill(options)
    assert (options.start, options.alpha) == (None, None)
    assert len(caplog.messages) == 1
    assert "not by --start" in caplog.text
    monkeypatch.setattr(starts, "is_sharded", lambda base: True)
    unlearner = SoftPromptUnlearner(build("llama"), prompt_config(kind, 4), start=train._start(options, None, None))
    assert unlearner.get_prompt_embedding_to_save("default").isfinite().all()
    options.start = "near"
    train._fill(options)
    assert options.start == "near"  # asked for, and then refused by the base


@pytest.mark.parametrize(("base", "after", "warned"), [(1.0, 0.5, True), (1.0, 0.04, False), (0.0, 0.0, False)])
def test_forget_rows_that_are_still_answered_are_warned_of(base, after, warned):
    found = {"accuracy": base, "f1": base, "generic": 0.0}
    scored = {f"eval_test_forget_{name}": value for name, value in (("accuracy", after), ("generic", 0.0))}
    record = SimpleNamespace(metrics={})
    unlearner = SimpleNamespace(disable_adapter=nullcontext, spul_config=record)
    trainer = SimpleNamespace(unlearner=unlearner, score=lambda rows, name: found, evaluate=lambda: scored)
    lines = train._scores(trainer, {"test_forget": []}, 5.0)
    assert lines[0] == f"test_forget: accuracy {after:.3f} (base {base:.3f}), generic 0.000 (base 0.000)"
    assert record.metrics == {"test_forget, detached": found}
    assert any("50.0 % of these rows are still answered as before" in line for line in lines) is warned
