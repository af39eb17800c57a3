"""Early stopping whose count survives a kill."""

from transformers import TrainerCallback


class Patience(TrainerCallback):
    """Ends training after `patience` evaluations in a row without a new best score.

    They are counted in the log that each checkpoint keeps, where transformers' EarlyStoppingCallback begins anew at a
    resume. A run that had ended is not trained further when it is started again.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        name, sign = f"eval_{args.metric_for_best_model.removeprefix('eval_')}", 1 if args.greater_is_better else -1
        scores = {row["step"]: sign * row[name] for row in state.log_history if name in row}
        best, waited = float("-inf"), 0
        for score in scores.values():
            best, waited = (score, 0) if score > best else (best, waited + 1)
        control.should_training_stop |= waited >= self.patience

    on_evaluate = on_train_begin


def patience_of(args) -> list[TrainerCallback]:
    """The callback of --patience, if it is given."""
    return [Patience(args.patience)] if args.patience else []
