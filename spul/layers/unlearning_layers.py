"""UnlearningLayers: small residual bottlenecks after the feed-forward blocks of a frozen causal LM."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.batch import LogitsFunction
from ..models.causal_lm import check_bare, evaluation_mode, has_layers, logits_at, unchanged_on_error
from ..models.compat import keep_4bit_differentiable, reset_compiled
from ..models.compat_checkpointing import switch_checkpointing, unswitched
from ..models.disabling import is_disabled_here
from ..models.loading import load_base
from ..models.noise import keep_in_evaluation, restore_dropout, set_samplers, zero_dropout
from ..models.protocol import Unlearner, drop_adapter_names
from ..records.spul_config import SpulConfig
from . import checkpoint as files
from .bottleneck import Bottleneck, LayerHook, UnlearningLayersConfig, feed_forward_blocks, layer_shapes, widths


class UnlearningLayers(nn.Module, Unlearner):
    """A frozen causal LM with a small trainable layer after each feed-forward block (EUL, arXiv 2310.20150).

    Each layer transforms a block's output before it is added to the residual stream, at first as the identity. The
    base is frozen and its dropout set to zero; its modules are not changed: the layers are forward hooks, removed by
    `remove`. They are trained in float32, or float64 if the base is in float64; the base may be in 8 or 4 bit.

    Train it with `UnlearningTrainer(model=layers, loss=...)`, or with `unlearning_forward(layers, loss, **batch)`.

    Args:
        model: a causal LM of transformers, without an adapter.
        config: `UnlearningLayersConfig()` unless given.

    Raises:
        TypeError: if `model` is not a causal LM, or has an adapter, LoRA layers inside included.
        ValueError: if it has unlearning layers already, no module's name ends as `target_modules` requires, or the
            bottleneck's width is less than 1.

    Example:
        ```python
        layers = UnlearningLayers(model, UnlearningLayersConfig(reduction=32))
        method = unlearning_method("EUL")
        trainer = UnlearningTrainer(layers, args, method.collator(tokenizer, generic), dataset, loss=method.loss)
        trainer.train()
        layers.save_pretrained("request-1")
        base = layers.remove()
        ```
    """

    in_words = "the unlearning layers"
    has_own_checkpoint = True
    can_be_sharded = False

    def __init__(self, model: PreTrainedModel, config: UnlearningLayersConfig | None = None) -> None:
        super().__init__()
        check_bare(model)
        config = UnlearningLayersConfig() if config is None else config
        if not isinstance(config, UnlearningLayersConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected an UnlearningLayersConfig.")
        self.base_model, self.layers_config = model, config
        self.block_names = feed_forward_blocks(model, config.target_modules)
        width, bottleneck = widths(model, config)
        self.layers = nn.ModuleList(
            Bottleneck(width, bottleneck, config.activation, config.init_seed + i, config.train_down)
            for i in range(len(self.block_names))
        )
        self._switched_on = True
        self.gram_matrices: dict[str, Tensor] = {}
        """Gram matrices of the projections' inputs, by the projections' names; computed by `gather_inputs`."""
        self.num_requests = 1
        """The number of requests in the layers: more than 1 once they are fused."""
        self.spul_config = SpulConfig()
        self._handles: list[Any] = []
        self._dropout: list[tuple[Any, str, float]] = []
        self._trained: list[nn.Parameter] = []
        self.attach()

    # ---- attaching and disabling ----

    def attach(self) -> None:
        """Attach the layers to the base again, after `remove`.

        Raises:
            ValueError: if the base has unlearning layers already, these or others, or a block is offloaded.
        """
        if has_layers(self.base_model):
            raise ValueError(
                "the base has unlearning layers already; remove them first: base = layers.remove(). Several "
                "requests become one set of layers by spul.fuse."
            )
        blocks = [self.base_model.get_submodule(name) for name in self.block_names]
        elsewhere = next(self.base_model.parameters())  # where a block has no weights
        devices = [next(block.parameters(), elsewhere).device for block in blocks]
        if torch.device("meta") in devices:
            name = self.block_names[devices.index(torch.device("meta"))]
            raise ValueError(
                f"{name} is offloaded to CPU or disk; unlearning layers need the base's weights in place: load it "
                "without offloading."
            )
        self._dropout = zero_dropout(self.base_model)
        keep_in_evaluation(self.base_model)
        self._trained = [parameter for parameter in self.base_model.parameters() if parameter.requires_grad]
        self.base_model.requires_grad_(False)
        keep_4bit_differentiable(self.base_model)
        dtype = torch.float64 if self.base_model.dtype == torch.float64 else torch.float32
        for name, block, layer, device in zip(self.block_names, blocks, self.layers, devices, strict=True):
            layer.to(device, dtype)
            self._handles.append(block.register_forward_hook(LayerHook(self, cast(Bottleneck, layer), name)))
        reset_compiled()

    @property
    def attached(self) -> bool:
        """Whether the layers are attached to the base."""
        return bool(self._handles)

    def remove(self) -> PreTrainedModel:
        """Detach the layers and return the base as it was before, dropout and `requires_grad` included."""
        if self.attached:
            set_samplers(self.base_model, self.base_model.training)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        restore_dropout(self._dropout)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._dropout, self._trained = [], []
        reset_compiled()
        return self.base_model

    @property
    def enabled(self) -> bool:
        """Whether the layers take part: a switch for all threads, False here inside `disable_adapter`."""
        return self._switched_on and not is_disabled_here(self)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._switched_on = value

    # ---- methods of the base ----

    def train(self, mode: bool = True) -> UnlearningLayers:
        """Set the mode, as of every module; those of the base that would draw at random in training do not train."""
        super().train(mode)
        if self.attached:
            keep_in_evaluation(self.base_model)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, with the layers.

        Raises:
            ValueError: if the layers are not attached, or `adapter_names` are given.
        """
        self._check_attached()
        drop_adapter_names(kwargs)
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate`, with the layers, in evaluation mode; raises as `forward`."""
        self._check_attached()
        drop_adapter_names(kwargs)
        # Gradient checkpointing, in training mode, would drop the cache.
        with unswitched(self.base_model), evaluation_mode(self.base_model):
            return cast(Any, self.base_model).generate(*args, **kwargs)

    def response_logits(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, K, V) at `positions` (B, K) of a right-padded batch."""
        return self.logits_through(self)(input_ids, attention_mask, positions)

    def logits_through(self, wrapper: nn.Module) -> LogitsFunction:
        """`response_logits` by a call of this model's wrapper (DDP, `torch.compile`), so that its hooks run."""

        def logits(input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
            return logits_at(wrapper, positions, input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

        return logits

    def embedding_logits(self, inputs_embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """`response_logits` from input embeddings (B, n, d)."""
        return logits_at(self, positions, inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    def check_trainable(self) -> None:
        """Raise unless the layers are attached."""
        if not self.attached:
            raise ValueError("the layers are not attached, so that the base would train; call layers.attach() first.")

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The layers' parameters that train."""
        return [
            p for name, p in self.layers.named_parameters() if self.layers_config.train_down or ".down." not in name
        ]

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        """The layers' config; empty where they are disabled."""
        return {"layers": self.layers_config.to_dict()} if self.enabled else {}

    def parameters_changed(self) -> None:
        """Clear metrics, digest and Gram matrices, which belong to the weights before an optimizer step."""
        super().parameters_changed()
        self.gram_matrices = {}

    def on_base(self, base: PreTrainedModel, folder: Path) -> UnlearningLayers:
        """The layers on another base, for inference, by way of a folder."""
        record = dataclasses.replace(self.spul_config)
        self.save_pretrained(folder)
        self.spul_config = record  # they were not saved where they are kept
        return type(self).from_pretrained(base, folder).eval()

    def load_checkpoint(self, folder: str) -> None:
        """Restore what `save_pretrained` wrote; what this training recorded of its rows and loss stays."""
        record = self.spul_config
        self.load_saved(files.read(folder))
        record.take_weights_of(self.spul_config)
        self.spul_config = record

    def _check_attached(self) -> None:
        if not self.attached:
            raise ValueError(
                "the layers are not attached, so that this would be the base; call layers.attach() first."
            )

    def get_base_model(self) -> PreTrainedModel:
        """The causal LM that the layers are for."""
        return self.base_model

    @property
    def config(self) -> Any:
        """The base's config; that of the layers is `layers_config`."""
        return self.base_model.config

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable gradient checkpointing in the base; by this name `Trainer` calls it from transformers 5.23 on."""
        switch_checkpointing(self.base_model, "enable", activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing in the base."""
        switch_checkpointing(self.base_model, "disable")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable gradient checkpointing in the base, by the name of all versions of transformers 5."""
        switch_checkpointing(self.base_model, "enable", gradient_checkpointing_kwargs, **kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable

    # ---- saving and loading ----

    def layers_state(self) -> dict[str, Tensor]:
        """Return the layers' weights, named after the block before each: `model.layers.0.mlp.down.weight`, ..."""
        return {
            f"{name}.{key}": value
            for name, layer in zip(self.block_names, self.layers, strict=True)
            for key, value in layer.state_dict().items()
        }

    def load_layers_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights into the layers, named as in `layers_state`.

        Raises:
            ValueError: if names or shapes differ.
        """
        own = self.layers_state()
        files.check_state(state, {key: tuple(value.shape) for key, value in own.items()})
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    def load_saved(self, saved: files.SavedLayers) -> None:
        """Copy the content of a folder into these layers: weights, Gram matrices, record.

        Raises:
            ValueError: if it has another config, or is for another model.
        """
        if (theirs := UnlearningLayersConfig(**saved.config)) != self.layers_config:
            raise ValueError(f"the saved layers have the config {theirs}, these layers have {self.layers_config}.")
        self.load_layers_state(saved.state)
        self.gram_matrices, self.num_requests = saved.gram_matrices, saved.num_requests
        self.spul_config = saved.spul_config

    @classmethod
    def from_saved(cls, base: PreTrainedModel, saved: files.SavedLayers) -> UnlearningLayers:
        """Attach layers from saved or fused weights; on an error the base is left unchanged.

        Raises:
            ValueError: if they are for another model.
        """
        config = UnlearningLayersConfig(**saved.config)
        if not isinstance(base, PreTrainedModel):
            return cls(base, config)  # which raises
        names = feed_forward_blocks(base, config.target_modules)
        files.check_state(saved.state, layer_shapes(names, *widths(base, config)))  # before it allocates
        with unchanged_on_error(base):
            layers = cls(base, config)
            try:
                layers.load_saved(saved)
            except BaseException:
                layers.remove()
                raise
        return layers

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the layers, their config, their Gram matrices for fusion, and a model card into a folder.

        Args:
            save_directory: the folder; files of an earlier save are replaced, each in one move.

        Raises:
            ValueError: if it is a file.
        """
        files.save(self, save_directory)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None, with_gram_matrices: bool = False
    ) -> str:
        """Save the layers and upload them to the Hub.

        Args:
            repo_id: `owner/name`; created if it does not exist.
            private: whether a new repository is private; the account's default unless given.
            token: the account's; the stored one unless given.
            with_gram_matrices: whether to upload the Gram matrices for fusion too, a summary of the forget set's
                hidden states.

        Returns:
            The URL of the commit.
        """
        return files.push(self, repo_id, private, token, with_gram_matrices)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | str | os.PathLike,
        folder: str | os.PathLike,
        is_trainable: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **hub: Any,
    ) -> UnlearningLayers:
        """Load saved layers onto their base.

        Args:
            model: the base, or its name or folder, which is then loaded with `AutoModelForCausalLM`.
            folder: folder or Hub name of the layers.
            is_trainable: whether to train them further.
            model_kwargs: passed to `AutoModelForCausalLM.from_pretrained` when `model` is a name.
            hub: Hub arguments, such as `revision`, `token`, `cache_dir`, `subfolder`.

        Raises:
            ValueError: if the folder holds no layers, they do not fit the base, or a file is damaged. The base is then
                as before.

        Warns:
            UserWarning: if the base's weights differ from those that the layers were trained on.
        """
        saved = files.read(folder, **hub)
        base = load_base(model, model_kwargs or {})
        layers = cls.from_saved(base, saved)
        files.check_base(base, saved.spul_config, folder)
        if is_trainable:
            # After more training, the record of the loaded layers no longer applies.
            layers.spul_config.base_fingerprint = layers.spul_config.weights_sha256 = None
            layers.spul_config.metrics, layers.gram_matrices = {}, {}
        else:
            layers.requires_grad_(False).eval()
        return layers
