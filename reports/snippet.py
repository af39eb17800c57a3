"""The model card's code: a file captioned with transformers (and peft) alone, as the repo's scripts caption it."""

import json

from peft import PeftModel

from common.prompts import COLUMN, columns_in
from models.families import base_model, model_inputs
from models.onnx_model import OnnxModel


def snippet(name: str, captioner, precision: str) -> str:
    """Python code that prints what `captioner` says of photo.jpg, byte for byte, for the model saved as `name`."""
    if isinstance(captioner.model, OnnxModel):  # which needs this repo's code, and onnxruntime
        loaded = f"Captioner.from_pretrained({_literal(name)})"
        return f'from captioner import Captioner\n\ncaptioner = {loaded}\nprint(captioner(["photo.jpg"])[0])'
    template = captioner.collator.template
    if template:  # as text, to be replaced
        captioner = captioner.with_settings(COLUMN.sub(r"{{\1\2}}", template))
    collator = captioner.collator
    processor_imports, processor = _processor(name, captioner)
    model_imports, model = _model(name, captioner, precision)
    inputs, before = _inputs(captioner)
    settings = ", ".join(f"{key}={value!r}" for key, value in captioner.search().items() if value is not None)
    image = ['image = ImageOps.exif_transpose(image).convert("RGB")']
    if collator.pixels.decoded_size:
        height, width = collator.pixels.decoded_size
        image = [f"image.draft(None, ({width}, {height}))", *image]
    printed = (
        f"({_literal(collator.words + ' ')} + caption).strip()"
        if captioner.keep_prompt and collator.words
        else "caption"
    )
    if captioner.filtered:
        printed += "  # without the characters that metrics/coco_caption/text_checks.py removes"
    return "\n".join(
        [
            "import torch",
            *model_imports,
            "from PIL import Image, ImageOps",
            f"from transformers import {', '.join([*processor_imports, _class(captioner)])}",
            "",
            f"processor = {processor}",
            *model,
            "",
            'image = Image.open("photo.jpg")',
            *image,
            *[f"# In place of {{...}}, the image's own: {', '.join(columns_in(template))}"] * bool(template),
            *inputs,
            f"settings = dict({settings})",
            f"tokens = model.generate(**inputs.to(model.dtype), **settings)[0, {before}:]",
            'caption = " ".join(processor.decode(tokens, skip_special_tokens=True).split())',
            f"print({printed})",
        ]
    )


def _literal(text: str) -> str:
    """A text as Python code, without what would end a code block of Markdown."""
    return json.dumps(text, ensure_ascii=False).replace("`", r"\u0060")


def _ids(ids: list[int]) -> str:
    """Token ids, of which the first, an image's placeholder, may come many times."""
    first = next((place for place, token in enumerate(ids) if token != ids[0]), len(ids))
    return f"[{ids[0]}] * {first} + {ids[first:]}" if first > 1 else str(ids)


def _class(captioner) -> str:
    return type(base_model(captioner.model)).__name__.removeprefix("FSDP")  # what torch prepends for sharded weights


def _processor(name: str, captioner) -> tuple[list[str], str]:
    """(what to import, the expression)."""
    if captioner.model.config.model_type == "vision-encoder-decoder":
        parts = ["AutoImageProcessor", "AutoTokenizer"]
        loaded = ", ".join(f"{part}.from_pretrained({_literal(name)})" for part in parts)
        return [*parts, "TrOCRProcessor"], f"TrOCRProcessor({loaded})"
    # Where our pixels are Pillow's, torchvision's would be rounded otherwise.
    backend = ', backend="pil"' if captioner.collator.pixels.size else ""
    return ["AutoProcessor"], f"AutoProcessor.from_pretrained({_literal(name)}{backend})"


def _model(name: str, captioner, precision: str) -> tuple[list[str], list[str]]:
    """(lines that import, lines that load)."""
    load = f"model = {_class(captioner)}.from_pretrained"
    if not isinstance(captioner.model, PeftModel):
        return [], [f"{load}({_literal(name)}, dtype=torch.{precision})"]
    return ["from peft import PeftConfig, PeftModel", "from transformers import GenerationConfig"], [
        f"base = PeftConfig.from_pretrained({_literal(name)}).base_model_name_or_path",
        f"{load}(base, dtype=torch.{precision})",
        f"model = PeftModel.from_pretrained(model, {_literal(name)}).merge_and_unload()",
        f"model.generation_config = GenerationConfig.from_pretrained({_literal(name)})  # not the base's",
    ]


def _inputs(captioner) -> tuple[list[str], str]:
    """(lines that make `inputs` of `image`, how many of the generated tokens are not the caption's)."""
    collator, model_type = captioner.collator, captioner.model.config.model_type
    if collator.joint:
        text = f"text=[{_literal(collator.text)}], add_special_tokens={collator.adds_special_tokens}"
        lines = [f'inputs = processor(images=[[image]], {text}, return_tensors="pt")']
        before = 'inputs["input_ids"].shape[1]'
    else:
        before = str(len(collator.before["input_ids"]))
        if (
            model_type == "blip"
        ):  # whose generate() puts the start token in place of the processor's first, and drops its last
            text = f", text={_literal(collator.words)}" if collator.words else ""
            lines = [f'inputs = processor(images=image{text}, return_tensors="pt")']
        else:
            named = model_inputs(captioner.model.config, collator.before)
            lines = ['inputs = processor.image_processor(image, return_tensors="pt")']
            lines += [f'inputs["{input_name}"] = torch.tensor([{_ids(ids)}])' for input_name, ids in named.items()]
    if model_type == "paligemma":
        lines.append('inputs.pop("labels", None)')
    if collator.decoder_prompt is not None:
        before = str(len(collator.decoder_prompt))
        lines.append(f'inputs["decoder_input_ids"] = torch.tensor([{collator.decoder_prompt}])')
    return lines, before
