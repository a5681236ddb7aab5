"""The default learning rate: by kind and width, as documented, and refused where there is no prompt."""

import pytest
from helpers import CONFIGS, build, build_llama, make_collator, make_dataset
from peft import PrefixTuningConfig

from spul import SoftPromptUnlearner
from spul.prompts import DiscriminativeStart
from spul.training import default_learning_rate


@pytest.mark.parametrize(("kind", "product"), [("prompt_tuning", 12.8), ("prefix_tuning", 7.7), ("p_tuning", 0.41)])
def test_the_rate_falls_with_the_width(kind, product):
    for width in (256, 512):
        unlearner = SoftPromptUnlearner(build_llama(width), CONFIGS[kind]())
        assert default_learning_rate(unlearner) == pytest.approx(product / width)


def test_fitted_keys_take_larger_steps():
    start = DiscriminativeStart(make_dataset(), make_collator(), progress=False)
    unlearner = SoftPromptUnlearner(build_llama(256), CONFIGS["prefix_tuning"]())
    assert default_learning_rate(unlearner, start) == pytest.approx(17.3 / 256)
    assert default_learning_rate(unlearner, "random") == pytest.approx(7.7 / 256)


def test_a_projected_prefix_has_the_rate_of_an_encoder():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True)
    plain = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    rates = [default_learning_rate(SoftPromptUnlearner(build("llama"), one)) for one in (config, plain)]
    assert rates == [pytest.approx(0.41 / 32), 0.1]


def test_a_model_without_a_prompt_is_refused():
    with pytest.raises(TypeError, match="unlearner is a LlamaForCausalLM; expected a SoftPromptUnlearner"):
        default_learning_rate(build("llama"))
