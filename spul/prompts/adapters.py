"""Prompts of one model: added, loaded, chosen, disabled, saved and deleted; only the active one trains."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModelForCausalLM, PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.checks import checked_list
from ..models.compat import is_sharded
from ..models.compat_checkpointing import without_checkpointing
from ..models.compat_devices import is_offloaded
from ..models.compat_modules import with_evaluated
from ..models.disabling import disabled_here, is_disabled_here
from ..models.protocol import Unlearner
from ..records.files import check_hub_arguments
from ..records.spul_config import SpulConfig
from . import checkpoint
from .configs import check_peft_config, check_promptable, filled
from .names import check_adapter_names, check_has_adapter, check_new_name
from .position import check_position
from .probe import check_prefix
from .shared_prefix import drop_cached, is_prefix
from .starts import Start, check_start, start_prompt


class PromptAdapters(PeftModelForCausalLM, Unlearner):
    """A PEFT model whose adapters are soft prompts, each with a record; see `SoftPromptUnlearner`."""

    prompt_encoder: Any  # set by PEFT
    _frozen: frozenset[str] = frozenset()  # names of prompts that `set_adapter` put into inference mode

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move base and prompts, as of every module; prompts alone where the base's weights are offloaded."""
        if not is_offloaded(self.get_base_model()):
            return super().to(*args, **kwargs)
        self.prompt_encoder.to(*args, **kwargs)
        return self

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        *args: Any,
        prompt_position: str = "start",
        start: Start | None = None,
        **kwargs: Any,
    ) -> None:
        """Add a new prompt beside the others; it is trained once `set_adapter` has made it the active one.

        After all were deleted it is the active one at once, and may be of another kind.

        Args:
            adapter_name: its name.
            peft_config: its config.
            args: further arguments of PEFT.
            prompt_position: `"start"` or `"message"`, as of the first prompt.
            start: how it begins, as in `SoftPromptUnlearner`.
            kwargs: further arguments of PEFT.

        Raises:
            TypeError: if its name is no text.
            ValueError: if it is of another kind than this model's prompts, or does not fit the base, or its name is
                empty, has a dot or slash, a space at an end, or is one that PyTorch, PEFT or a gate has for itself.
        """
        check_new_name(adapter_name)
        check_peft_config(peft_config)
        check_position(prompt_position, peft_config)
        check_start(start, peft_config)
        is_first = "spul_configs" not in self.__dict__  # its base was checked before, and its start comes afterwards
        if not is_first:
            check_promptable(self.get_base_model(), peft_config)
            peft_config = filled(self.get_base_model(), peft_config)
            own, others = PeftType(peft_config.peft_type), PeftType(self.peft_type)
            if own != others and self.peft_config:
                raise ValueError(
                    f"the prompt {adapter_name!r} is {own.value}, and the prompts of this model are {others.value}; "
                    "one model holds prompts of one kind. Train them as one kind, or serve them by two models."
                )
        with checkpoint.registry_unchanged_on_error(self):
            self.peft_type = peft_config.peft_type  # another kind may follow where all were deleted
            with without_checkpointing(self.get_base_model()):  # under which PEFT refuses a prefix
                super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            # In __dict__, since PEFT adds the first adapter before this class's own attributes are set.
            record = SpulConfig(prompt_position=prompt_position)
            self.__dict__.setdefault("spul_configs", {})[adapter_name] = record
            if not self.active_adapter:  # all others were deleted; PEFT would leave the model without a prompt
                self.active_adapter = adapter_name
                if is_prefix(self) and not is_sharded(self.get_base_model()):
                    check_prefix(self)
            if not (is_first or peft_config.inference_mode):
                start_prompt(self, adapter_name, start)
            self._train_active_prompt_only()

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make a prompt the active one; only it requires gradients.

        Args:
            adapter_name: its name.
            inference_mode: whether it is frozen, until it is set again without.

        Raises:
            TypeError: if its name is no text, such as a list of names.
            ValueError: if there is no prompt of that name.
        """
        check_has_adapter(self, adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._frozen = self._frozen | {adapter_name} if inference_mode else self._frozen - {adapter_name}
        self._train_active_prompt_only()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a prompt. If it was the active one, another becomes active; without any, the model is the base.

        Raises:
            TypeError: if its name is no text.
            ValueError: if there is no prompt of that name.
        """
        check_has_adapter(self, adapter_name)
        super().delete_adapter(adapter_name)
        del self.spul_configs[adapter_name]
        self._frozen = self._frozen - {adapter_name}
        drop_cached(self, adapter_name)
        self._train_active_prompt_only()

    @property
    def spul_config(self) -> Any:
        """The record of the active prompt, saved as `spul_config.json`; its `metrics` appear on the model card.

        None where all prompts are deleted.
        """
        return self.spul_configs[self.active_adapter] if self.active_adapter else None

    def load_adapter(  # type: ignore[override]
        self, model_id: str | os.PathLike, adapter_name: str, is_trainable: bool = False, **hub: Any
    ) -> None:
        """Load a prompt into this model: a new one for inference, or the saved state of one in this model.

        On an error the model is as before, its prompts and records included.

        Args:
            model_id: folder or Hub name of the adapter.
            adapter_name: name of the prompt in this model.
            is_trainable: whether to train it further, which a prompt in this model allows that is trainable itself.
            hub: Hub arguments, such as `revision`, `token`, `cache_dir`, `subfolder`.

        Raises:
            TypeError: if it is not a soft prompt, or an argument is not one of the Hub's.
            ValueError: if the folder's files are damaged or do not belong together, the prompt does not fit the base
                or the prompt of that name, the folder lacks the encoder of a trainable P-tuning prompt, or a new
                prompt is to be trainable.

        Warns:
            UserWarning: if the base's weights are not those that the prompt was trained on.
        """
        check_hub_arguments(hub)
        if is_trainable and adapter_name not in self.peft_config:
            raise ValueError(
                f"is_trainable=True, and {adapter_name!r} is not in this model; to train a saved prompt further, load "
                "it on the base: SoftPromptUnlearner.from_pretrained(..., is_trainable=True)."
            )
        checkpoint.load_into(self, model_id, adapter_name, **hub)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a plain PEFT adapter folder, with `spul_config.json` and a model card.

        A prompt at `"message"` has a `peft_type` of its own in `adapter_config.json`, which plain PEFT refuses.

        Files of an earlier save are replaced one by one, each in one move: an interrupted save leaves no half-written
        file. P-tuning (and prefix tuning with a projection) also writes `prompt_encoder.safetensors`, which only
        further training needs.

        Args:
            save_directory: the folder.
            safe_serialization: must stay True: adapters are safetensors only.
            selected_adapters: names of the prompts to save; all unless given.
            kwargs: as in `PeftModel.save_pretrained`, such as `is_main_process=False` for processes that write
                nothing.

        Raises:
            TypeError: if a selected name is no text, or a text is given for the list of them.
            ValueError: for `safe_serialization=False`, for no or an unknown name, or if all prompts were deleted.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would pickle the prompt; spul saves safetensors only.")
        self._check_has_prompt()
        if selected_adapters is not None:
            for name in checked_list("selected_adapters", selected_adapters):
                check_has_adapter(self, name)
        view: Any = copy.copy(self)  # PEFT marks the configs as those of inference while it writes them
        view.peft_config = {name: copy.copy(config) for name, config in self.peft_config.items()}
        peft_save = super(PromptAdapters, view).save_pretrained
        checkpoint.save(self, peft_save, save_directory, selected_adapters, **kwargs)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The rows (p, width) of a prompt as they are saved: its encoder's output, without `encoder_dropout`.

        Args:
            adapter_name: the prompt.
        """
        view = with_evaluated(self, "prompt_encoder")
        return super(PromptAdapters, view).get_prompt_embedding_to_save(adapter_name)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes; see `PeftModel.push_to_hub`.

        Raises:
            ValueError: if all prompts were deleted.
        """
        self._check_has_prompt()
        pushed = super().push_to_hub(repo_id, *args, **kwargs)
        for name, record in self.spul_configs.items():  # not the scratch folder's
            record.name = repo_id if name == "default" else f"{repo_id}/{name}"
        return pushed

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write the model card of the active prompt (`README.md`); `save_pretrained` writes one for each prompt.

        Raises:
            ValueError: if all prompts were deleted.
        """
        self._check_has_prompt()
        checkpoint.write_model_card(self, output_dir, self.active_adapter)

    def _check_has_prompt(self) -> None:
        if not self.peft_config:
            raise ValueError(
                "there is no prompt to save: all were deleted. Add one with add_adapter, or load one with "
                "load_adapter."
            )

    def _train_active_prompt_only(self) -> None:
        # PEFT leaves every prompt trainable; an unused one breaks DDP on its second step.
        for name, encoder in self.prompt_encoder.items():
            is_frozen = name in self._frozen or self.peft_config[name].inference_mode
            encoder.requires_grad_(name == self.active_adapter and not is_frozen)
            if getattr(encoder, "frozen_embedding", None) is not None:  # a cartridge's first virtual tokens
                encoder.frozen_embedding.requires_grad_(False)

    def get_base_model(self) -> Any:
        """The causal LM under the prompts, also once all of them are deleted."""
        return self.base_model

    def check_adapter_names(self, adapter_names: Sequence[str], num_rows: int) -> None:
        """Raise unless there is one name for each of `num_rows` rows, of a prompt of this model or `"__base__"`."""
        check_adapter_names(self, adapter_names, num_rows)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context manager: `forward` and `generate` are those of the base, without the prompt.

        It holds for the calling thread, or its asyncio task: others keep the prompt.
        """
        with disabled_here(self):
            yield

    @property
    def has_active_enabled_adapter(self) -> bool:
        """PEFT's name of `enabled`."""
        return bool(self.active_adapter) and super().has_active_enabled_adapter and not is_disabled_here(self)

    @property
    def enabled(self) -> bool:
        """Whether the prompt takes part in `forward` and `generate` of this thread; see `disable_adapter`."""
        return self.has_active_enabled_adapter

    @property
    def virtual_tokens_in_use(self) -> int:
        """Virtual tokens that every row has; 0 where the prompt is disabled."""
        return self.active_peft_config.num_virtual_tokens if self.enabled else 0

    @property
    def longest_prompt(self) -> int:
        """Virtual tokens of the longest of all prompts; 0 where they are disabled."""
        configs: Any = self.peft_config
        return max(one.num_virtual_tokens for one in configs.values()) if self.enabled else 0

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters of the prompts."""
        return list(self.prompt_encoder.parameters())

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        """The config of the active prompt, by its name; empty where it is disabled."""
        return {self.active_adapter: self.prompt_settings(self.active_adapter)} if self.enabled else {}

    def prompt_settings(self, adapter_name: str) -> dict[str, Any]:
        """The config of a prompt, with its position where that is not the start."""
        position = self.spul_configs[adapter_name].prompt_position
        config: Any = self.peft_config[adapter_name]
        return config.to_dict() | ({} if position == "start" else {"prompt_position": position})

    def on_base(self, base: PreTrainedModel, folder: Path, all_prompts: bool = False) -> Any:
        """The active prompt on another base, or all of them, for inference, by way of a folder."""
        names = list(self.peft_config) if all_prompts else [self.active_adapter]
        records = {name: dataclasses.replace(self.spul_configs[name]) for name in names}
        self.save_pretrained(str(folder), selected_adapters=names)
        self.spul_configs |= records  # they were not saved where they are kept
        first, *others = sorted(names, key=lambda name: name != self.active_adapter)
        own = {name: folder / checkpoint.folder_of(name) for name in names}
        moved: Any = type(self).from_pretrained(base, own[first], adapter_name=first)
        for name in others:
            moved.load_adapter(own[name], name)
        return moved.eval()
