"""Short trainings with options of Trainer, for tests of them."""

from __future__ import annotations

from helpers import (
    arguments,
    make_collator,
    make_dataset,
    make_unlearner,
)

from spul import UnlearningTrainer


def trained(folder, model=None, loss=None, dataset=None, **kwargs):
    """A trainer after its training, for any trainable."""
    names = ("reference", "eval_dataset", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "model_init")
    names += ("forget_fraction", "compute_metrics", "processing_class", "train_dataset")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    model = make_unlearner() if model is None and "model_init" not in own else model
    settings = arguments(folder, **{"max_steps": 2, **kwargs})
    dataset = make_dataset() if dataset is None else dataset
    trainer = UnlearningTrainer(model, settings, make_collator(), dataset, loss=loss, **own)
    trainer.train()
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
