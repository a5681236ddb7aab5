"""`spul combine`: from saved prompts and files to one prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_files import flags, parsed, write_files, write_prompt
from helpers import GENERIC
from servers import make_gated

from spul import SoftPromptUnlearner
from spul.commands import combine

SHORT = {"max_steps": 3, "num_virtual_tokens": 4, "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def prompts(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name, seed in (("one", 1), ("two", 2)):
        write_prompt(folder / name)
        path = folder / name
        torch.manual_seed(seed)
        loaded = SoftPromptUnlearner.from_pretrained(files["model"], path)
        with torch.no_grad():
            loaded.prompt_encoder["default"].embedding.weight.normal_()
        loaded.save_pretrained(str(path))
    return [str(folder / name) for name in ("one", "two")]


def combined(files, prompts, folder, **more):
    values = {"model": files["model"], "prompts": prompts, "output_dir": folder, **SHORT, "generic": GENERIC, **more}
    assert combine.run(parsed("combine", values)) is None
    return SoftPromptUnlearner.from_pretrained(files["model"], folder)


def test_prompts_are_combined_on_the_rows_of_their_requests(files, prompts, tmp_path):
    sets = {"forget": [files["forget"], files["test_forget"]], "retain": files["retain"]}
    found = combined(files, prompts, tmp_path, **sets, num_virtual_tokens=6)
    assert found.active_peft_config.num_virtual_tokens == 6
    assert found.spul_config.forget.rows == 9
    assert len(found.spul_config.combined_from) == 2


def test_combining_is_not_resumed_and_says_so(files, prompts, tmp_path):
    with pytest.raises(ValueError, match="resume_from_checkpoint='checkpoint-1': combining is not resumed"):
        combined(files, prompts, tmp_path, inputs=files["test_forget"], resume_from_checkpoint="checkpoint-1")
    with pytest.raises(ValueError, match=r"push_to_hub would upload the checkpoints .*: hf upload REPO"):
        combined(files, prompts, tmp_path, inputs=files["test_forget"], push_to_hub="true")


def test_prompts_are_combined_on_other_inputs(files, prompts, tmp_path):
    found = combined(files, prompts, tmp_path, inputs=files["test_forget"])
    assert found.spul_config.forget is None
    assert len(found.spul_config.combined_from) == 2


@pytest.mark.parametrize(
    "more",
    [
        *({name: 0.25} for name in ("alpha", "beta", "forget_fraction")),
        *({"reference": "live"}, {"reference_dir": "x"}, {"digest_key": "key"}),
    ],
)
def test_options_that_have_no_effect_on_inputs_are_refused(files, prompts, tmp_path, more):
    with pytest.raises(ValueError, match=f"{flags(more)[0]}: of no effect on inputs"):
        combined(files, prompts, tmp_path, inputs=files["test_forget"], **more)


def test_prompts_beside_the_one_of_a_folder_are_not_left_out(files, prompts, tmp_path):
    gated = make_gated("other")
    gated.unlearner.float()
    gated.save_pretrained(tmp_path / "several")
    folders = [str(tmp_path / "several"), str(tmp_path / "several" / "other")]
    with pytest.raises(ValueError, match=r"several also holds the prompts \['other'\], which would be left out"):
        combined(files, [*prompts, folders[0]], tmp_path / "out", inputs=files["test_forget"])
    found = combined(files, folders, tmp_path / "out", inputs=files["test_forget"])
    assert len(found.spul_config.combined_from) == 2


@pytest.mark.parametrize("sets", [(), ("forget",), ("retain",), ("forget", "retain", "inputs")])
def test_other_sets_of_rows_are_refused(files, prompts, tmp_path, sets):
    given = dict.fromkeys(sets, files["forget"])
    with pytest.raises(ValueError, match="or --inputs alone"):
        combined(files, prompts, tmp_path, **given)


def test_a_folder_that_is_no_prompt_is_refused_before_the_base_is_loaded(files, prompts, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM"}')
    others = {**files, "model": str(tmp_path / "no-base")}
    with pytest.raises(ValueError, match="lora"):
        combined(others, [*prompts, str(tmp_path / "lora")], tmp_path / "out", inputs=files["test_forget"])


def test_a_prompt_is_not_combined_into_the_folder_of_another(files, prompts, tmp_path):
    before = Path(prompts[0], "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a saved prompt, which may be served; name another folder"):
        combined({**files, "model": "no-base"}, prompts, prompts[0], inputs=files["test_forget"])
    assert Path(prompts[0], "adapter_model.safetensors").read_bytes() == before
