"""What differs between captioner families, a row each. Found by the config's `model_type`."""

from dataclasses import dataclass

from transformers import BlipForConditionalGeneration


@dataclass(frozen=True)
class Family:
    model_class: type
    # Attribute paths from the model.
    vision: str
    # The id that the decoder's input begins with, at training as at generation. For BLIP it is [DEC]; the plain
    # processor's [CLS] would be a mismatch between training and generation.
    start_token: str
    end_token: str
    pad_token: str


FAMILIES = {
    "blip": Family(
        model_class=BlipForConditionalGeneration,
        vision="vision_model",
        start_token="text_config.bos_token_id",
        end_token="text_config.sep_token_id",
        pad_token="text_config.pad_token_id",
    ),
}


def family_of(config, where: str = "the model") -> Family:
    """The row of a model's config; ValueError names the known families if there is none."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{where} is of family '{config.model_type}'. Known families: {known}.") from None


def special_tokens(config) -> tuple[int, int, int]:
    """(start, end, pad) token ids of the text decoder."""
    family = family_of(config)

    def look_up(path):
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        return value

    return look_up(family.start_token), look_up(family.end_token), look_up(family.pad_token)
