"""Models and their processors: from a folder, from the Hub, or from scratch by a config file."""

import json
import logging
from collections import Counter
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoConfig, AutoProcessor, BertTokenizer, BlipConfig, BlipProcessor

from models.blip_attention import use_fast_attention
from models.cpu_linear import use_onednn_linear
from models.families import family_of

logger = logging.getLogger(__name__)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # of every BERT vocabulary, and first in our own


def load_model(model_name_or_path: str, fast_attention: bool = True, revision: str = "main"):
    """A captioner and its processor, from a local folder or the Hub.

    Weights are read from safetensors only, and no code of the repository is run. ValueError if there is no model, if
    its family is not known, or if some weights of the captioner are missing from it.
    """
    folder = Path(model_name_or_path)
    if folder.exists() and not (folder / "config.json").is_file():
        inside = "it is a file" if folder.is_file() else "it has no config.json"
        hint = ""
        if folder.is_dir() and (checkpoints := sorted(folder.glob("checkpoint-*"))):
            hint = f" It holds checkpoints: try {checkpoints[-1]}."
        raise ValueError(f"{model_name_or_path} is not a model folder: {inside}.{hint}")
    options = {"trust_remote_code": False, "revision": revision}
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, **options)
        family = family_of(config, model_name_or_path)
        wanted = family.model_class.__name__
        if config.architectures and wanted not in config.architectures:
            raise ValueError(f"{model_name_or_path} is a {config.architectures[0]}; a captioner, {wanted}, is needed.")
        processor = AutoProcessor.from_pretrained(model_name_or_path, **options)
        model, info = family.model_class.from_pretrained(
            model_name_or_path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {model_name_or_path} are damaged ({error}): copy or download them again."
        ) from None
    except OSError as error:
        raise ValueError(
            f"Could not load a model from '{model_name_or_path}'. Neither a local folder nor a reachable, "
            f"safetensors-holding model of the Hub. The library says: {str(error).splitlines()[0]}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{model_name_or_path} lacks {len(missing)} weights of {family.model_class.__name__} "
            f"(first: {missing[0]}): it is a checkpoint of another kind of model."
        )
    return _speed_up(model, fast_attention), processor


def build_model(config_path: str, tokenizer_vocab: str | None, captions, fast_attention: bool = True):
    """A BLIP with random weights and its processor, from a BlipConfig JSON file.

    The tokenizer has the words of `tokenizer_vocab` (a vocab.txt of BERT's; BLIP's own [DEC] and [ENC] are added), or,
    without one, those counted in `captions` (an iterable of str). Sizes and ids that follow from it are set in the config.
    Call after the seed is set.
    """
    settings = read_model_config(config_path)
    tokenizer = _tokenizer(tokenizer_vocab, captions)
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
    return _speed_up(model, fast_attention), BlipProcessor(image_processor, tokenizer)


def _speed_up(model, fast_attention: bool):
    return use_onednn_linear(use_fast_attention(model, fast_attention), fast_attention)


def read_model_config(config_path: str) -> dict:
    """The settings of a BlipConfig JSON file; ValueError if it is not one."""
    try:
        settings = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model_config: there is no file {config_path}.") from None
    except ValueError as error:
        raise ValueError(f"model_config: {config_path} is not JSON: {error}") from None
    if not isinstance(settings, dict) or not {"vision_config", "text_config"} <= set(settings):
        raise ValueError(f"model_config: {config_path} must hold a BlipConfig with a vision_config and a text_config.")
    return settings


def _spread_vision_weights(model) -> None:
    """BlipVisionConfig's initializer_range is 1e-10, meant to be overwritten by a checkpoint: from scratch it leaves a
    vision encoder that sees nothing. A range that was set on purpose is kept."""
    vision = model.config.vision_config
    if vision.initializer_range > 1e-6:
        return
    for name, parameter in model.vision_model.named_parameters():
        if name.endswith("position_embedding"):
            torch.nn.init.normal_(parameter)  # as strong as the patches: weaker, positions take long to be heard
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def _tokenizer(vocab_file: str | None, captions) -> BertTokenizer:
    if vocab_file is None:
        # The most frequent words, and all characters for the rest. Counted here, as the tokenizers library's own
        # WordPiece trainer gives another vocabulary each time.
        normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
        words = Counter(
            word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
        )
        frequent = sorted(words, key=lambda word: (-words[word], word))[:8000]
        characters = sorted(set("".join(words)))
        pieces = [*frequent, *characters, *(f"##{character}" for character in characters)]
        vocab = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}
    else:
        try:
            lines = Path(vocab_file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"tokenizer_vocab: {vocab_file} cannot be read: {error}") from None
        vocab = {word: index for index, word in enumerate(lines)}
        if absent := set(SPECIAL) - set(vocab):
            raise ValueError(f"tokenizer_vocab: {vocab_file} lacks {', '.join(sorted(absent))}: not a BERT vocab.txt.")
    tokenizer = BertTokenizer(vocab=vocab, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
