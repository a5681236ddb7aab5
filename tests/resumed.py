"""Trainings that stop after a step, for tests of resuming them."""

from helpers import arguments, make_collator, make_dataset, make_unlearner

from spul import UnlearningLoss, UnlearningTrainer, forget_retain_dataset
from spul.training import augmented, rewritings

STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


def make(folder, dataset=None, loss=None, collator=None, own=None, unlearner=None, **more):
    return UnlearningTrainer(
        make_unlearner(loss=UnlearningLoss() if loss is None else loss) if unlearner is None else unlearner,
        arguments(folder, **{**STEPS, **more}),
        make_collator() if collator is None else collator,
        make_dataset() if dataset is None else dataset,
        **(own or {}),
    )


def with_rewritten(forget, retain):
    ways, collator = rewritings(None, retain, 3, (1,)), make_collator(max_length=200)
    return forget_retain_dataset(
        *(augmented(side, ways, collator, 2.0, 3, skips_unchanged=True) for side in (forget, retain))
    )
