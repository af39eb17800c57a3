"""What differs between captioner families, one row per family, looked up by the config's `model_type`.

A caption's tokens have the same layout in all of them: the prompt, made here, then the caption, then the end token. The
prompt holds the start token, the image's placeholder tokens if a family has them, and the user's words.
"""

import inspect
import logging
from dataclasses import dataclass, field, replace

import transformers
from jinja2 import TemplateError
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from common.errors import UserError
from common.logs import say_once

logger = logging.getLogger(__name__)
ENCODED = "mm_encoder_outputs"  # the library's name for encoded images among a chat model's inputs
LAST = "last"  # in Family.caption_tokens: the value of the prompt's last token


def _blip_prompt(processor, config, words: str) -> dict:
    # [DEC] starts a caption at generation, so also in training; the plain processor's [CLS] would be a mismatch.
    return {"input_ids": [config.text_config.bos_token_id, *_words(processor, words)]}


def _git_prompt(processor, config, words: str) -> dict:
    return {"input_ids": [processor.tokenizer.cls_token_id, *_words(processor, words)]}


def _blip2_prompt(processor, config, words: str) -> dict:
    # The tokenizer's own special tokens: OPT's and Llama's start token, or the end token that T5 puts after its input.
    return {"input_ids": [config.image_token_id] * config.num_query_tokens + processor.tokenizer(words)["input_ids"]}


def _instructblip_prompt(processor, config, words: str) -> dict:
    seen_by_qformer = processor.qformer_tokenizer(words)["input_ids"]
    return _blip2_prompt(processor, config, words) | {"qformer_input_ids": seen_by_qformer}


def _decoder_prompt(processor, config, words: str) -> dict:
    return {"input_ids": [_decoder_start(config), *_words(processor, words)]}


def _decoder_start(config) -> int:
    """The token that an encoder-decoder's decoder starts with."""
    text = config.get_text_config(decoder=True)
    tokens = [getattr(of, "decoder_start_token_id", None) for of in (config, text)] + [text.bos_token_id]
    return next(token for token in tokens if token is not None)


def _words(processor, words: str) -> list[int]:
    return processor.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []


def _chat_texts(processor, words: str, system: str = "") -> tuple[str, str, str]:
    """What a chat template writes before an answer, between that and the answer's first word, and after the answer.

    Words that a conversation has between its generation prompt and an answer (the header of the answer's turn, if a
    template has no generation prompt) belong to the prompt: they are never targets.
    """
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turns.append(user)
    try:
        prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
        before, marker, closing = processor.apply_chat_template([*turns, answer]).rpartition("ANSWER")
    except TemplateError as error:
        raise UserError(f"The model's chat template refuses this prompt: {error}") from None
    if system.strip() not in prompt:
        raise UserError("The model's chat template leaves out a system prompt: leave out --system_prompt.")
    if not marker:
        raise UserError("The chat template leaves out the text of an answer: a caption cannot be trained behind it.")
    if not before.startswith(prompt):
        say_once(
            logger,
            f"The chat template opens an answer with {before[-24:]!r}, but its generation prompt ends in {prompt[-24:]!r}: "
            "captions are trained and generated right behind the generation prompt.",
        )
        return prompt, "", closing
    lead = before.removeprefix(prompt)
    if lead.strip():
        say_once(logger, f"The chat template's generation prompt lacks {lead!r}, which opens an answer: it is added.")
        spaces = lead[len(lead.rstrip(" ")) :]
        return before.removesuffix(spaces), spaces, closing
    return prompt, lead, closing


def _chat_prompt(processor, words: str, system: str = "") -> str:
    return _chat_texts(processor, words, system)[0]


def _chat_answer(processor, words: str, system: str = "") -> tuple[str, int]:
    """What a template puts between its prompt and an answer, and the token that ends the answer."""
    tokenizer = processor.tokenizer
    _, lead, closing = _chat_texts(processor, words, system)
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    closing = [token for token in ids if token in tokenizer.added_tokens_decoder]
    return lead, closing[0] if closing else tokenizer.eos_token_id


def _paligemma_prompt(processor, words: str) -> str:
    return f"<image>{words}"  # the processor puts start token and newline around it


def _plain_prompt(processor, words: str) -> str:
    return words  # the processor puts the image's tokens before it


def _plain_answer(processor, words: str) -> tuple[str, int]:
    return "", processor.tokenizer.eos_token_id


@dataclass(frozen=True)
class Family:
    architecture: str  # the model's class in transformers
    # Attribute paths, from the model: the vision encoder (the first that exists), and from the config: the end and
    # padding tokens of a caption.
    vision: tuple[str, ...]
    end_token: str
    pad_token: str
    # Modules that LoRA adapts by default: a regular expression that the whole name must match.
    lora_targets: str
    # (processor, config, words) -> the token ids before every caption, by the name of the model's argument. None if
    # they depend on the image: then `joint_prompt` (processor, words) is the text that the processor makes them from,
    # with the image, and `answer` the text between that and a caption, and the token that ends a caption.
    prompt: callable = None
    joint_prompt: callable = None
    answer: callable = None
    default_words: str = ""
    # The values of a caption's tokens in each input that runs along the text, except the ids and the attention mask.
    caption_tokens: dict = field(default_factory=lambda: {"token_type_ids": 0, "mm_token_type_ids": 0})
    # Whether the model counts positions from the beginning of a row, padding included.
    reads_padding: bool = False
    # Whether the processor itself adds start and end tokens to a prompt.
    writes_special_tokens: bool = False
    # {name in the image processor's output: our name for it}; empty if that is `pixel_values`.
    image_inputs: dict = field(default_factory=dict)
    # {name in a batch: the model's name for it}, where they differ; None if the model does not take it.
    renamed: dict = field(default_factory=dict)
    # config -> the token ids that a caption begins with in a decoder whose encoder reads the prompt. None: its start.
    decoder_prompt: callable = None
    vision_takes_encoded: bool = False  # whether models/vision.py lets the vision encoder take encoded images
    unread: str = ""  # weights that the model has but never reads: a regular expression of whole names
    license: str | None = None  # of the published weights, where all have the same

    @property
    def model_class(self) -> type:
        """Imported when asked for: importing the classes of all families takes a second."""
        return getattr(transformers, self.architecture)

    @property
    def chats(self) -> bool:
        """Whether the prompt is made by the processor's chat template."""
        return self.joint_prompt is _chat_prompt

    @property
    def pixels(self) -> str:
        """The name of the input that holds the images."""
        return next(iter(self.image_inputs.values()), "pixel_values")

    @property
    def text_inputs(self) -> set[str]:
        """Names of the inputs that have a row for each caption. All others have rows for images."""
        names = {
            "input_ids",
            "attention_mask",
            "qformer_input_ids",
            "qformer_attention_mask",
            "decoder_input_ids",
            "labels",
        }
        return names | set(self.caption_tokens)


_LANGUAGE = r"language_model\..*\.(q|k|v|o|wi_0|wi_1|wo|q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
# The parts of the Q-Former that the queries pass through: the last layer's text side is never read.
_QFORMER = r"qformer\..*\.(query|key|value|attention\.output\.dense|(intermediate|output)_query\.dense)"
_BLIP2 = {
    "vision": ("vision_model",),
    "end_token": "text_config.eos_token_id",  # OPT checkpoints name the newline here
    "pad_token": "text_config.pad_token_id",
    "lora_targets": rf"({_LANGUAGE}|{_QFORMER})",
    "vision_takes_encoded": True,
}
_CHAT = {
    "vision": ("model.vision_model", "model.visual", "model.vision_tower"),
    "end_token": "text_config.eos_token_id",
    "pad_token": "text_config.pad_token_id",
    "lora_targets": r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}

FAMILIES = {
    "blip": Family(
        architecture="BlipForConditionalGeneration",
        vision=("vision_model",),
        end_token="text_config.sep_token_id",
        pad_token="text_config.pad_token_id",
        prompt=_blip_prompt,
        license="bsd-3-clause",
        lora_targets=r"text_decoder\..*\.(query|key|value|dense)",
    ),
    "git": Family(
        architecture="GitForCausalLM",
        vision=("git.image_encoder",),
        end_token="eos_token_id",
        pad_token="pad_token_id",
        prompt=_git_prompt,
        vision_takes_encoded=True,
        license="mit",
        lora_targets=r"git\.encoder\..*\.(query|key|value|dense)",
    ),
    "blip-2": Family("Blip2ForConditionalGeneration", prompt=_blip2_prompt, license="mit", **_BLIP2),
    "instructblip": Family(
        "InstructBlipForConditionalGeneration",
        prompt=_instructblip_prompt,
        default_words="A short image description:",
        **_BLIP2,
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        joint_prompt=_paligemma_prompt,
        answer=_plain_answer,
        default_words="caption en",
        caption_tokens={"token_type_ids": 1},  # 0 is the prefix, whose tokens see each other in both directions
        **_CHAT,
    ),
}
# An encoder of images only, and a decoder of the prompt and the caption.
_IN_DECODER = {"input_ids": "decoder_input_ids", "attention_mask": None}
FAMILIES |= {
    "vision-encoder-decoder": Family(  # ViT-GPT2, TrOCR, Donut
        "VisionEncoderDecoderModel",
        vision=("encoder",),
        end_token="decoder.eos_token_id",
        pad_token="decoder.pad_token_id",
        prompt=_decoder_prompt,
        renamed=_IN_DECODER,
        vision_takes_encoded=True,
        unread=r"encoder\.pooler\..*",
        lora_targets=r"decoder\..*\.(c_attn|q_attn|c_proj|c_fc|query|key|value|dense|q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    ),
    "pix2struct": Family(
        "Pix2StructForConditionalGeneration",
        vision=("encoder",),
        end_token="text_config.eos_token_id",
        pad_token="text_config.pad_token_id",
        prompt=_decoder_prompt,
        image_inputs={"flattened_patches": "flattened_patches", "attention_mask": "patch_mask"},
        renamed=_IN_DECODER | {"patch_mask": "attention_mask"},
        vision_takes_encoded=True,
        license="apache-2.0",
        lora_targets=r"decoder\..*\.(query|key|value|output|wi_0|wi_1|wo)",
    ),
    "florence2": Family(
        "Florence2ForConditionalGeneration",
        joint_prompt=_plain_prompt,
        answer=_plain_answer,
        default_words="<CAPTION>",
        vision_takes_encoded=True,
        writes_special_tokens=True,
        # As in its own training: the start token, then that of a text.
        decoder_prompt=lambda config: [_decoder_start(config), config.text_config.bos_token_id],
        license="mit",
        **_CHAT | {"lora_targets": r"model\.language_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"},
    ),
    "kosmos-2": Family(
        "Kosmos2ForConditionalGeneration",
        joint_prompt=_plain_prompt,
        answer=_plain_answer,
        default_words="An image of",
        vision_takes_encoded=True,
        caption_tokens={"image_embeds_position_mask": 0},
        reads_padding=True,
        license="mit",
        **_CHAT
        | {
            "vision": ("vision_model",),
            "lora_targets": r"text_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        },
    ),
}
# Models that are prompted with their processor's chat template.
CHAT = Family(
    "AutoModelForImageTextToText",
    joint_prompt=_chat_prompt,
    answer=_chat_answer,
    default_words="Describe the image in one sentence.",
    **_CHAT,
)
FAMILIES |= {
    "gemma3": CHAT,
    "idefics2": CHAT,
    "idefics3": CHAT,
    "internvl": CHAT,
    "janus": CHAT,
    "llava": CHAT,
    "llava_onevision": CHAT,
    "mllama": replace(CHAT, caption_tokens={"cross_attention_mask": LAST}),
    "qwen2_5_vl": CHAT,
    "qwen2_vl": CHAT,
    "qwen3_vl": CHAT,
    "smolvlm": CHAT,
}
# Families of the library's image-text-to-text models that cannot caption, each with the reason.
REFUSED = {
    "diffusion_gemma": "it writes all tokens at once, by diffusion, and captions are decoded one token after the other",
    "evolla": "it takes proteins, not pictures",
    "instructblipvideo": "it takes videos",
    "pi0": "it moves robots, and writes nothing",
    "shieldgemma2": "it judges whether a picture is harmful, and writes nothing",
    "udop": "it takes the words of a page and their boxes with the picture",
}


def family_of(config, where: str = "the model") -> Family:
    """The row of a model's config; ValueError names the known families if there is none. A chat family of the library
    that was not tested gets the general row, and a warning."""
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise UserError(f"{where} is of family '{model_type}', which cannot caption: {REFUSED[model_type]}.")
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        say_once(logger, f"Not tested on family '{model_type}': its prompt is what its chat template says.")
        return CHAT
    raise UserError(f"{where} is of family '{model_type}'. Known families: {', '.join(sorted(FAMILIES))}.")


def placeholders(config, processor) -> list[int]:
    """Ids of the placeholder tokens of images, videos and sounds: a caption never has any of them."""
    names = [f"{modality}_token_{end}" for modality in ("image", "video", "audio") for end in ("id", "index")]
    tokens = {getattr(source, name, None) for source in (config, processor) for name in names}
    return sorted(token for token in tokens if isinstance(token, int) and token >= 0)


def decoder_prompt(config) -> list[int] | None:
    """The tokens before a caption in a decoder whose encoder reads the prompt; None for other models."""
    if not is_encoder_decoder(config):
        return None
    made_by = family_of(config).decoder_prompt
    return made_by(config) if made_by else [config.text_config.decoder_start_token_id]


def special_tokens(config) -> tuple[int, int]:
    """(end, pad) token ids of a caption."""
    family = family_of(config)

    def look_up(path):
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        return value[0] if isinstance(value, list) else value

    end, pad = look_up(family.end_token), look_up(family.pad_token)
    return end, end if pad is None else pad


def base_model(model):
    """The model itself, without the wrapper of DDP or an adapter."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vision_encoder(model):
    """The module that encodes images."""
    model = base_model(model)
    for path in family_of(model.config).vision:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise UserError(f"{type(model).__name__} has no vision encoder under a known name.")


def model_inputs(config, batch: dict) -> dict:
    """The inputs of a batch by the model's names."""
    renamed = family_of(config).renamed
    named = {renamed.get(name, name): value for name, value in batch.items()}
    named.pop(None, None)
    return named


def takes(model, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(base_model(model).forward).parameters


def is_encoder_decoder(config) -> bool:
    """Whether a text encoder reads the prompt, and the decoder only the caption (T5)."""
    return not family_of(config).renamed and bool(
        getattr(getattr(config, "text_config", config), "is_encoder_decoder", False)
    )
