"""Train methods on one experiment and evaluate each with every measure and attack.

    python examples/evaluate_methods.py --dataset reviews --model small --methods SPUL GA+GD EUL
    python examples/evaluate_methods.py --dataset sst2 --data-dir ../shared/data/sst2 \\
        --model ../shared/models/small-lm --second-question --limit 8000 --limit-score 1000 --memorise-lr 1e-3 \\
        --memorise-batch-size 64 --steps 2000 --alpha 2 --beta 1 --methods SPUL

Each method is held against the model detached, or as it was before, and against one retrained without the forget
rows. For each method there is a folder with `evaluation.json`, `measurements.jsonl`, `report.md`, `report.html` and
figures; `attacks.md` has all methods side by side. An interrupted run goes on where it stopped.

`--augment` trains the method on attacked rows as well (`spul.data.augmented`); other attacks of the same kinds are
evaluated.
"""
