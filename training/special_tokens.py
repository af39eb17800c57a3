"""The model keeps its own start, end and padding tokens while it is trained."""

import logging

from transformers import TrainerCallback

from models.families import base_model

NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


class KeepSpecialTokens(TrainerCallback):
    """Undoes what the Trainer does before training: it puts the tokenizer's special tokens into the model's configs
    (transformers.trainer_utils.align_special_tokens). A captioner ends its captions with its own config's end token:
    for BLIP-2 OPT a newline, which its tokenizer does not name. A checkpoint with another one could not be resumed."""

    def __init__(self, model):
        model = base_model(model)
        self.configs = [model.config.get_text_config(), model.generation_config]
        self.values = [{name: getattr(config, name, None) for name in NAMES} for config in self.configs]
        logging.getLogger("transformers.trainer_utils").addFilter(
            lambda record: "new PAD/BOS/EOS tokens" not in record.getMessage()
        )

    def on_train_begin(self, args, state, control, **kwargs):
        for config, values in zip(self.configs, self.values, strict=True):
            for name, value in values.items():
                if getattr(config, name, None) != value:
                    setattr(config, name, value)
