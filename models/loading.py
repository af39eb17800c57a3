"""Models and their processors: from a folder, from the Hub, or from scratch by a config file."""

import json
import logging
import re
from collections import Counter
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    BitsAndBytesConfig,
    BlipConfig,
    BlipProcessor,
    TrOCRProcessor,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.utils import is_bitsandbytes_available

from common.errors import UserError
from common.existence import SERVER
from common.text import read_text
from common.weights import check_keys, read_weights
from models.adapters import add_adapter, check_targets, find_adapter, load_adapter, load_adapter_weights, own_file
from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from models.families import base_model, family_of, vision_encoder
from models.onnx_model import DECODER, OnnxModel
from models.vision import take_encoded_images

logger = logging.getLogger(__name__)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in every BERT vocabulary, and first in our own


def load_model(
    model_name_or_path: str,
    fast_attention: bool = True,
    revision: str = "main",
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
    merge: bool = True,
    weights: bool = True,
):
    """A captioner and its processor, from a local folder or the Hub. Without `weights` it is built from its config on
    the meta device, and no weights are read.

    Weights are read by common.weights, and no code of the repository is run. `dtype` is float32 or bfloat16;
    `quantization` 4bit or 8bit; `max_pixels` and `min_pixels` are for processors that have them. For an adapter, the base model that it names is loaded first, and the adapter merged
    into it, or with `merge` False added to it, trainable. ValueError if there is no model, if its family is unknown, or
    if its weights are not exactly those of the captioner.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"dtype {dtype}: weights are loaded in float32 or bfloat16. float16 has too small a range to train."
        )
    adapter = find_adapter(model_name_or_path, revision)
    if adapter:
        base = adapter["base_model_name_or_path"]
        logger.info("%s is an adapter (LoRA): loading its base model %s", model_name_or_path, base)
        try:
            options = {"dtype": dtype, "quantization": quantization, "weights": weights}
            options |= {"attn_implementation": attn_implementation, "max_pixels": max_pixels, "min_pixels": min_pixels}
            model, processor = load_model(base, fast_attention, adapter.get("revision") or "main", **options)
        except ValueError as error:
            raise UserError(f"{model_name_or_path} is an adapter, and its base model does not load: {error}") from None
        if not weights:
            return get_peft_model(model, PeftConfig.from_pretrained(model_name_or_path, revision=revision)), processor
        model = load_adapter(model, model_name_or_path, revision)
        # In 4 or 8 bits a merge would round anew, and caption otherwise than what was trained.
        return (model.merge_and_unload() if merge and not quantization else model), processor
    folder = Path(model_name_or_path)
    if folder.exists() and not (folder / "config.json").is_file():
        inside = "it is a file" if folder.is_file() else "it has no config.json"
        hint = ""
        if folder.is_dir() and (checkpoints := sorted(folder.glob("checkpoint-*"))):
            hint = f" It holds checkpoints: try {checkpoints[-1]}."
        raise UserError(f"{model_name_or_path} is not a model folder: {inside}.{hint}")
    options = {"trust_remote_code": False, "revision": revision}
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, **options)
        family = family_of(config, model_name_or_path)
        architecture = family.architecture
        if config.architectures and architecture not in config.architectures and not architecture.startswith("Auto"):
            raise UserError(
                f"{model_name_or_path} is a {config.architectures[0]}; a captioner, {architecture}, is needed."
            )
        processor = _load_processor(config, model_name_or_path, options)
        limit_pixels(processor, {"max_pixels": max_pixels, "min_pixels": min_pixels})
        if (folder / DECODER).is_file():
            if quantization or attn_implementation or dtype != "float32":
                raise UserError(
                    f"{model_name_or_path} holds ONNX graphs, whose precision and attention are their own: leave out --bf16, "
                    "--quantization and --attn_implementation."
                )
            return _with_special_tokens(OnnxModel(config, folder), processor), processor
        if not weights:
            return ready(without_weights(family.model_class, config, dtype), processor, fast_attention), processor
        if quantization:
            options["quantization_config"] = quantization_config(quantization)
        options |= {"dtype": getattr(torch, dtype), "unread": family.unread}
        if attn_implementation:
            check_attention(config, family, attn_implementation)
            options["attn_implementation"] = attn_implementation
        model = read_weights(family.model_class, model_name_or_path, **options)
    except OSError as error:
        raise UserError(
            f"Could not load a model from '{model_name_or_path}'. Neither a local folder nor a reachable model of the "
            f"Hub with safetensors or pytorch_model.bin. The library says: {str(error).splitlines()[0]}"
        ) from error
    return ready(model, processor, fast_attention), processor


def limit_pixels(processor, limits: dict) -> None:
    """Set these limits of the image processor that are not None, in place. UserError if it has none."""
    limits = {name: value for name, value in limits.items() if value is not None}
    images = processor.image_processor
    if absent := limits.keys() - getattr(getattr(images, "valid_kwargs", None), "__annotations__", {}).keys():
        raise UserError(f"--{min(absent)}: {type(images).__name__} has no such limit. Leave it out.")
    if limits:
        processor.image_processor = images = type(images).from_dict(images.to_dict() | limits)
        if images.size["shortest_edge"] > images.size["longest_edge"]:
            least, largest = images.size["shortest_edge"], images.size["longest_edge"]
            raise UserError(f"--min_pixels, {least}, is more than --max_pixels, {largest}.")


def check_attention(config, family, name: str) -> None:
    """UserError if the model cannot have this attention of the library here."""
    try:
        without_weights(family.model_class, config, "float32", attn_implementation=name)
    except (ImportError, ValueError) as error:
        raise UserError(f"--attn_implementation {name}: {str(error).splitlines()[0]}") from None


def asks(model_name_or_path: str, revision: str, prompt: str | None) -> dict:
    """What rows' own prompts are made of, as data.load takes it: {"prompt"}, one that holds columns, and {"own_questions"},
    whether conversations are asked their own questions. Both are the checkpoint's, unless --prompt says otherwise; those of
    families that are asked a question, where train.py did not say. A model on a server is asked one."""
    if model_name_or_path.startswith(SERVER):
        return {"prompt": prompt, "own_questions": prompt is None}
    adapter = find_adapter(model_name_or_path, revision)
    if adapter and not own_file(model_name_or_path, "config.json", revision):
        return asks(adapter["base_model_name_or_path"], adapter.get("revision") or "main", prompt)
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
        family = family_of(config, model_name_or_path)
    except (OSError, ValueError):  # loading the model says what is wrong with it
        return {"prompt": prompt, "own_questions": False}
    trained = hasattr(config, "caption_prompt")
    own_questions = (
        getattr(config, "caption_text", {}).get("own_questions", False) if trained else bool(family.default_words)
    )
    return {
        "prompt": getattr(config, "caption_prompt", None) if prompt is None else prompt,
        "own_questions": own_questions and prompt is None,
    }


def _load_processor(config, model_name_or_path: str, options: dict):
    """The processor from a folder or the Hub; rebuilt if it was saved as two parts."""
    try:
        if config.model_type != "vision-encoder-decoder":
            return AutoProcessor.from_pretrained(model_name_or_path, **options)
        parts = [part.from_pretrained(model_name_or_path, **options) for part in (AutoImageProcessor, AutoTokenizer)]
        return TrOCRProcessor(*parts)  # the library's pair for any model of this kind
    except ImportError as error:
        message = " ".join(str(error).split())
        named = re.search(r"pip install ([\w.-]+)|requires the (\w+) library", message)
        package = error.name or (next(filter(None, named.groups())).lower() if named else "a package")
        raise UserError(
            f"The processor of {model_name_or_path} needs {package}, which is not installed: pip install {package}. The "
            f"library says: {message.partition('. ')[0]}"
        ) from error


def without_weights(model_class, config, dtype: str, **options):
    """A model of the config's shape on the meta device."""
    make = getattr(model_class, "from_config", None) or model_class._from_config  # an Auto class, or a model's own
    with torch.device("meta"):
        model = make(config, dtype=getattr(torch, dtype), **options)
    model.config.name_or_path = model.config.name_or_path or config.name_or_path
    return model


def load_weights(model, checkpoint: str) -> None:
    """Load the weights of a checkpoint into `model`, in place: parameters stay those that an optimizer has, in their
    dtype and on their device, modules keep their classes.

    Uses from_pretrained, since save_pretrained writes published names, which for many families are not those of the
    modules. ValueError if a weight is missing or unexpected.
    """
    if isinstance(model, PeftModel):
        load_adapter_weights(model, checkpoint)
        return
    # float32 holds every weight of a half-precision one exactly.
    family = family_of(model.config)
    saved = read_weights(family.model_class, checkpoint, dtype=torch.float32, unread=family.unread).state_dict()
    state = model.state_dict()
    check_keys(checkpoint, type(model).__name__, state.keys() - saved.keys(), saved.keys() - state.keys())
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(saved[name])


def keep_published_names(model) -> None:
    """Let `save_pretrained` write an encoder's weights under the names that published checkpoints have, and servers look for.

    transformers takes "vision_model." out of the names of CLIP's and SigLIP's weights, and puts it back only if the checkpoint
    that it loaded had it, which one that it has made itself has not.
    """
    conversions = list(getattr(model, "_weight_conversions", None) or ())
    scopes = {change.scope_prefix for change in conversions if isinstance(change, PrefixChange)}
    published = get_model_conversion_mapping(model, add_legacy=False)
    if not conversions:  # made from its config
        conversions = [change for change in published if not isinstance(change, PrefixChange)]
    encoders = [change for change in published if isinstance(change, PrefixChange) and change.scope_prefix]
    model._weight_conversions = conversions + [change for change in encoders if change.scope_prefix not in scopes]


def quantization_config(quantization: str) -> BitsAndBytesConfig:
    """bitsandbytes' 4-bit NF4 or 8-bit; ValueError where it cannot run."""
    if quantization not in ("4bit", "8bit"):
        raise UserError(f"quantization {quantization}: it is 4bit or 8bit.")
    if not torch.cuda.is_available():
        raise UserError(f"quantization {quantization} needs a CUDA GPU, and there is none here. Leave it out.")
    if not is_bitsandbytes_available():
        raise UserError(f"quantization {quantization} needs bitsandbytes: pip install bitsandbytes")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
    )


def build_model(
    config_path: str,
    tokenizer_vocab: str | None,
    captions,
    fast_attention: bool = True,
    strip_accents: bool | None = None,
):
    """A BLIP with random weights and its processor, from a BlipConfig JSON file.

    The tokenizer has the words of `tokenizer_vocab` (a BERT vocab.txt; BLIP's own [DEC] and [ENC] are added), or,
    without one, the most frequent ones of `captions` (an iterable of str). `strip_accents` None strips them with a
    `tokenizer_vocab`, as BERT does, and keeps them otherwise. Sizes and ids that follow from the tokenizer are set in
    the config. Call after the seed is set.
    """
    settings = read_model_config(config_path)
    tokenizer = _tokenizer(tokenizer_vocab, captions, strip_accents)
    config = BlipConfig.from_dict(settings)
    text = config.text_config
    text.vocab_size = len(tokenizer)
    text.bos_token_id = tokenizer.convert_tokens_to_ids("[DEC]")
    text.sep_token_id = text.eos_token_id = tokenizer.sep_token_id
    text.pad_token_id = tokenizer.pad_token_id
    text.encoder_hidden_size = config.vision_config.hidden_size
    side = config.vision_config.image_size
    image_processor = transformers.BlipImageProcessor(size={"height": side, "width": side})
    model = family_of(config).model_class(config)
    _spread_vision_weights(model)
    processor = BlipProcessor(image_processor, tokenizer)
    return ready(model, processor, fast_attention), processor


def make_trainable(model, adapter_args, freeze_vision: bool):
    """The model with the weights to train trainable and in float32: all of them, or with `use_peft` those of its own
    adapter or of a new one. `adapter_args` are AdapterArguments, settled (models.adapters.settle)."""
    a = adapter_args
    if isinstance(model, OnnxModel):
        raise UserError("ONNX graphs caption, and are not trained: name the model that they were made from.")
    if a.use_peft and isinstance(model, PeftModel):
        check_targets(model, a.lora_targets)
    elif a.use_peft:
        modules = {"targets": a.lora_targets, "modules_to_save": a.modules_to_save}
        model = add_adapter(model, r=a.lora_r, alpha=a.lora_alpha, dropout=a.lora_dropout, **modules)
    elif getattr(model, "is_quantized", False):
        raise UserError("Quantised weights cannot be trained: pass --use_peft, or leave --quantization out.")
    if freeze_vision:
        vision_encoder(model).requires_grad_(False)
    # The Trainer calls this with checkpointing on, for the reentrant kind that we do not use; GIT adds in place to the
    # embeddings, which then could not have a gradient of their own.
    base_model(model).enable_input_require_grads = lambda: None
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return model


def ready(model, processor, fast_attention: bool = True):
    """Enable the model's fast paths, and fill in what old checkpoints and their processors lack, in place."""
    _with_special_tokens(model, processor)
    if family_of(model.config).chats and not getattr(processor, "chat_template", None):
        raise UserError(
            f"The processor of this {model.config.model_type} model has no chat template: none to ask with."
        )
    if getattr(model.config, "is_vqa", False) or getattr(processor.image_processor, "is_vqa", False):
        raise UserError(
            "This Pix2Struct answers questions: it takes header text, a question drawn onto the picture. The ones that "
            "caption, such as pix2struct-textcaps-base, take none."
        )
    use_onednn_linear(take_encoded_images(model), fast_attention)
    if model.config.model_type == "blip":
        use_fast_attention(model, fast_attention)
    return model


def _with_special_tokens(model, processor):
    if model.config.model_type in ("blip-2", "instructblip"):
        _fill_in_image_tokens(model, processor)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return model


def _fill_in_image_tokens(model, processor) -> None:
    """Checkpoints from before transformers 4.46 have neither the image placeholder nor the number of them per image."""
    processor.num_query_tokens = model.config.num_query_tokens
    tokenizer = processor.tokenizer
    if getattr(model.config, "image_token_index", None) is None:
        model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")  # the processor added it
    if model.config.image_token_index >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)


def read_model_config(config_path: str) -> dict:
    """The settings of a BlipConfig JSON file; ValueError if it is not one."""
    try:
        settings = json.loads(read_text(config_path))
    except FileNotFoundError:
        raise UserError(f"model_config: there is no file {config_path}.") from None
    except ValueError as error:
        raise UserError(f"model_config: {config_path} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not {"vision_config", "text_config"} <= set(settings):
        raise UserError(f"model_config: {config_path} must hold a BlipConfig with a vision_config and a text_config.")
    return settings


def _spread_vision_weights(model) -> None:
    """BlipVisionConfig's initializer_range is 1e-10, meant to be overwritten by a checkpoint: from scratch it leaves a
    vision encoder that sees nothing. A range that was set on purpose is kept."""
    vision = model.config.vision_config
    if vision.initializer_range > 1e-6:
        return
    for name, parameter in model.vision_model.named_parameters():
        if name.endswith("position_embedding"):
            torch.nn.init.normal_(parameter)  # as large as the patches: smaller ones take long to have an effect
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def _tokenizer(vocab_file: str | None, captions, strip_accents: bool | None = None) -> BertTokenizer:
    if vocab_file is None:
        strip_accents = bool(strip_accents)
        # The most frequent words, and all characters for the rest. Counted here, as the tokenizers library's own
        # WordPiece trainer gives a different vocabulary each time.
        normalizer, splitter = BertNormalizer(lowercase=True, strip_accents=strip_accents), BertPreTokenizer()
        words = Counter(
            word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        )
        frequent = sorted(words, key=lambda word: (-words[word], word))[:8000]
        characters = sorted(set("".join(words)))
        pieces = [*frequent, *characters, *(f"##{character}" for character in characters)]
        vocab = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    else:
        try:
            lines = read_text(vocab_file).splitlines()
        except OSError as error:
            raise UserError(f"tokenizer_vocab: {vocab_file} cannot be read: {error}") from None
        vocab = {word: index for index, word in enumerate(lines)}
        if absent := set(SPECIAL) - set(vocab):
            raise UserError(f"tokenizer_vocab: {vocab_file} lacks {', '.join(sorted(absent))}: not a BERT vocab.txt.")
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=True, strip_accents=strip_accents)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
