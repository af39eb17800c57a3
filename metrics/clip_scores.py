"""CLIP-S, PAC-S and PAC-S++, with and without references: how well captions fit their images, as a CLIP sees it.

With unit features of an image v, a caption c and its references r, and the cosine cos:

    CLIP-S     2.5 max(cos(v, c), 0)      any CLIP      Hessel et al., "CLIPScore" (EMNLP 2021), github.com/jmhessel/clipscore
    PAC-S      2   max(cos(v, c), 0)      PAC weights   Sarto et al. (CVPR 2023), github.com/aimagelab/pacscore
    PAC-S++    2   max(cos(v, c), 0)      PAC++ weights Sarto et al. (arXiv 2410.07336), same repository
    Ref...     harmonic mean of the score above and max(max_r cos(c, r), 0)

Captions and references begin with "A photo depicts ". Images are resized (bicubic, shorter side) and cropped at the
centre. Features are computed and normalised in float32: in half precision CLIP-S is visibly off.

PAC-S is defined by PAC's weights, so `PAC-S` is only reported for a checkpoint in the published layout whose tensors
all fit, and whose projections, which PAC trains, are not those of the CLIP it started from.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

from common.errors import UserError
from common.loaders import data_loader
from common.weights import read_weights
from data import open_image
from metrics.coco_caption.coco import resampled_sums

logger = logging.getLogger(__name__)

PREFIX = "A photo depicts "
NAMES = {"clip-s": "CLIP-S", "pac-s": "PAC-S", "pac-s++": "PAC-S++"}
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """Scores captions with one CLIP. Features of images and of references are kept, so that each is encoded once.

    `metric` is one of NAMES. `source` says what the weights are: the folder or file, and its fingerprint.
    """

    def __init__(self, metric: str, model: CLIPModel, tokenizer, mean=OPENAI_MEAN, std=OPENAI_STD, source=None):
        self.metric, self.name = metric, NAMES[metric]
        self.weight = 2.5 if metric == "clip-s" else 2.0
        self.model, self.tokenizer = model.float().eval().requires_grad_(False), tokenizer
        self.size = model.config.vision_config.image_size
        self.max_length = model.config.text_config.max_position_embeddings
        self.mean, self.std, self.source = mean, std, source or {}
        self._images: dict[tuple, torch.Tensor] = {}
        self._references: dict[str, torch.Tensor] = {}

    @classmethod
    def load(cls, metric: str, clip_model: str, pac_checkpoint: str | None = None, device="cpu") -> "ClipScorer":
        """From a CLIP folder or Hub id, and for PAC-S and PAC-S++ the published checkpoint of the same shape.

        ValueError if the CLIP is not one, or if the checkpoint is not what `metric` claims.
        """
        if metric not in NAMES:
            raise UserError(f"'{metric}' is not a CLIP-based score. Known: {', '.join(NAMES)}.")
        model, tokenizer, mean, std = load_clip(clip_model)
        if metric == "clip-s":
            source = {"clip_model": str(clip_model), "sha256": fingerprint(model)}
        elif not pac_checkpoint:
            raise UserError(
                f"{metric} is {NAMES[metric]} only with its published weights: pass --pac_checkpoint FILE (the .pth files "
                f"that github.com/aimagelab/pacscore links to). With {clip_model} alone the score is clip-s."
            )
        else:
            model.load_state_dict(read_pac_checkpoint(pac_checkpoint, model, metric))
            digest = hashlib.sha256(Path(pac_checkpoint).read_bytes()).hexdigest()
            source = {"clip_model": str(clip_model), "pac_checkpoint": str(pac_checkpoint), "sha256": digest}
        return cls(metric, model.to(device), tokenizer, mean, std, source)

    def score(
        self, image_ids, images, captions, references=None, *, prefix: str = PREFIX, clip: bool = True, num_workers=0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(scores, reference scores) of each caption, (captions,) each; the second is None without `references`.

        Args:
            image_ids: what the images' features are kept under: their split and name, as splits may share names.
            images: as data.open_image takes them; not opened where the features are known.
            captions: k per image, grouped, in the images' order.
            references: the reference captions of each image.
            prefix, clip: "" and False give the reward of DiCO's published code: bare captions, negative cosines kept.
            num_workers: processes that read images.
        """
        k = len(captions) // len(image_ids)
        if not captions or len(captions) != k * len(image_ids):
            raise UserError(f"{len(captions)} captions cannot be divided evenly among {len(image_ids)} images.")
        pictures = self.image_features(image_ids, images, num_workers)
        texts = self.text_features([prefix + caption for caption in captions])
        cosines = (pictures.repeat_interleave(k, dim=0) * texts).sum(dim=-1)
        scores = self.weight * (cosines.clamp(min=0) if clip else cosines)
        if references is None:
            return scores.numpy(), None
        self._keep_references([prefix + text for group in references for text in group])
        nearest = torch.cat(
            [
                (of_image @ torch.stack([self._references[prefix + text] for text in group]).T).amax(dim=1)
                for of_image, group in zip(texts.split(k), references, strict=True)
            ]
        )
        nearest = nearest.clamp(min=0)
        # A score of zero or below has no harmonic mean worth the name; the limit from above is zero.
        total = torch.where(scores > 0, scores + nearest, 1)
        return scores.numpy(), torch.where(scores > 0, 2 * scores * nearest / total, 0 * scores).numpy()

    def knows(self, image_id) -> bool:
        """Whether the image's features are kept."""
        return image_id in self._images

    @torch.inference_mode()
    def image_features(self, image_ids, images, num_workers: int = 0) -> torch.Tensor:
        """Unit features on the CPU, (images, d) float32; for new images, computed in batches on the model's device."""
        new = {image_id: index for index, image_id in enumerate(image_ids) if image_id not in self._images}
        pictures = _Pictures(images, list(new.values()), self.size, self.mean, self.std)
        done = iter(new)
        for pixel_values in data_loader(pictures, None, batch_size=64, num_workers=num_workers if len(new) > 64 else 0):
            pooled = self.model.vision_model(pixel_values=pixel_values.to(self.model.device)).pooler_output
            features = normalize(self.model.visual_projection(pooled), dim=-1).cpu()
            self._images |= {image_id: feature for feature, image_id in zip(features, done, strict=False)}
        return torch.stack([self._images[image_id] for image_id in image_ids])

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Unit features on the CPU, (texts, d) float32. A text too long for the CLIP is cut, as in the official code."""
        different = sorted(set(texts), key=lambda text: (len(text), text))  # so that a batch has little padding
        number = {text: index for index, text in enumerate(different)}
        features = []
        for start in range(0, len(different), 256):
            tokens = self.tokenizer(
                different[start : start + 256],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                return_token_type_ids=False,
            ).to(self.model.device)
            pooled = self.model.text_model(**tokens).pooler_output
            features.append(normalize(self.model.text_projection(pooled), dim=-1).cpu())
        return torch.cat(features)[[number[text] for text in texts]]

    def cut(self, texts: list[str]) -> int:
        """How many of the texts have more tokens than this CLIP reads."""
        lengths = map(len, self.tokenizer(texts, truncation=False, verbose=False).input_ids)
        return sum(length > self.max_length for length in lengths)

    def _keep_references(self, texts: list[str]) -> None:
        if new := list(dict.fromkeys(text for text in texts if text not in self._references)):
            self._references |= dict(zip(new, self.text_features(new), strict=True))


def load_scorers(metric_args, device="cpu", also=()) -> list[ClipScorer]:
    """The scorers that the flags of MetricArguments ask for, and those of `also`; ValueError if one cannot load."""
    names = list(dict.fromkeys([*metric_args.clip_metrics, *also]))
    if names and not metric_args.clip_model:
        raise UserError(f"{' '.join(names)} needs --clip_model: the folder or Hub id of a CLIP to score with.")
    return [ClipScorer.load(name, metric_args.clip_model, metric_args.pac_checkpoint, device) for name in names]


def clip_scores(
    scorers: list[ClipScorer],
    predictions,
    references,
    images,
    *,
    bootstrap_samples: int,
    seed: int,
    split: str = "",
    num_workers=0,
) -> tuple[dict, dict[str, np.ndarray]]:
    """(metrics, per image) of one caption per image: each scorer's two scores, their 95 % bootstrap intervals over the
    resamples of metrics.score, and under "clip_weights" what they were computed with.

    predictions: {image id: caption}; references: {image id: captions}; images: one of each reference's images, in
    their order; split: the one that they are of.
    """
    ids = list(references)
    pictures = [(split, image_id) for image_id in ids]
    per_image, weights = {}, {}
    for scorer in scorers:
        captions = [predictions[image_id] for image_id in ids]
        of_images = list(references.values())
        plain, with_references = scorer.score(pictures, images, captions, of_images, num_workers=num_workers)
        per_image |= {scorer.name: plain, f"Ref{scorer.name}": with_references}
        cut = scorer.cut([PREFIX + caption for caption in captions])
        weights[scorer.name] = {**scorer.source, "max_tokens": scorer.max_length, "cut_captions": cut}
        if cut:
            logger.warning(
                "%s: %d of %d captions have more than the CLIP's %d tokens, and it does not see the rest. Name a CLIP for long "
                "texts with --clip_model.",
                scorer.name,
                cut,
                len(captions),
                scorer.max_length,
            )
    metrics = {name: float(values.mean()) for name, values in per_image.items()}
    metrics["intervals"] = {}
    if bootstrap_samples:
        sums = resampled_sums(np.stack(list(per_image.values()), axis=1).astype(float), bootstrap_samples, seed)
        ends = np.percentile(sums / len(ids), [2.5, 97.5], axis=0)
        metrics["intervals"] = {name: ends[:, column].tolist() for column, name in enumerate(per_image)}
    metrics["clip_weights"] = weights
    return metrics, per_image


# ---------------------------------------------------------------------------------------------------------------------
# Images


class _Pictures(Dataset):
    """The pixels of some of `images`, opened and prepared in the DataLoader worker."""

    def __init__(self, images, indices: list[int], size: int, mean, std):
        self.images, self.indices, self.size, self.mean, self.std = images, indices, size, mean, std

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> np.ndarray:
        return preprocess(open_image(self.images[self.indices[number]]), self.size, self.mean, self.std)


def preprocess(image: Image.Image, size: int, mean=OPENAI_MEAN, std=OPENAI_STD) -> np.ndarray:
    """(3, size, size) float32 of an RGB image, as the official codes' torchvision makes it: Resize(size, bicubic) of the
    shorter side, CenterCrop(size), ToTensor, Normalize. transformers' own processor crops odd margins a pixel off."""
    width, height = image.size
    short, long = min(width, height), int(size * max(width, height) / min(width, height))
    if short != size:
        width, height = (size, long) if width <= height else (long, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / np.float32(255)
    return ((pixels - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def load_clip(clip_model: str):
    """(model, tokenizer, mean, std) of a CLIP folder or Hub id; ValueError if it holds no complete CLIP."""
    try:
        config = AutoConfig.from_pretrained(clip_model, trust_remote_code=False)
        if config.model_type != "clip":
            raise UserError(f"clip_model: {clip_model} is a {config.model_type}; a CLIP is needed.")
        model = read_weights(CLIPModel, clip_model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(clip_model, trust_remote_code=False)
    except OSError as error:
        raise UserError(f"clip_model: {clip_model} cannot be loaded: {str(error).splitlines()[0]}") from error
    try:
        processor = CLIPImageProcessor.from_pretrained(clip_model)
        mean, std = processor.image_mean, processor.image_std
    except OSError:
        logger.warning("%s has no preprocessor_config.json: images are normalised as for OpenAI's CLIP", clip_model)
        mean, std = OPENAI_MEAN, OPENAI_STD
    return model, tokenizer, mean, std


def fingerprint(model) -> str:
    """SHA-256 of a model's weights: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


# OpenAI's name -> transformers' name. open_clip's ViT has OpenAI's names. Projections are stored transposed.
RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
RENAMED_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def read_pac_checkpoint(path: str, model: CLIPModel, metric: str) -> dict[str, torch.Tensor]:
    """The published checkpoint of "pac-s" or "pac-s++" as a state dict of `model`, which is a CLIP of its shape.

    The files are torch pickles whose "state_dict" has OpenAI's names (ViT-B/32, all of PAC-S++) or open_clip's, which
    are the same (ViT-L/14). PAC-S++ also has LoRA layers. They are added to the weights, scaled by 1 / rank, except
    those of the MLPs: the published evaluation marks these as merged before it reads the checkpoint, and so adds
    nothing to the weights there (models/custom_loralib/layers.py at 27075a9). Same here, for equal scores.

    ValueError if a tensor is missing, unknown or of another shape, if the metric is not that of the file, if its
    activation cannot be `model`'s, or if the projections are `model`'s own: then it is not a PAC checkpoint.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(loaded["state_dict"])
    except FileNotFoundError:
        raise UserError(f"pac_checkpoint: there is no file {path}.") from None
    except Exception as error:  # not a zip, not a pickle, a pickle of something other than tensors, no such key
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"pac_checkpoint: {path} is not one of PAC-S's published files, tensors under 'state_dict' ({reason})."
        ) from None
    has_lora = any("lora_" in name for name in state)
    if has_lora != (metric == "pac-s++"):
        right = "pac-s++" if has_lora else "pac-s"
        raise UserError(f"pac_checkpoint: {path} is a checkpoint of {NAMES[right]}: ask for {right}, not {metric}.")
    _check_activation(path, state, model, has_lora)

    try:
        if has_lora:
            state = _without_lora(state)
        converted = _to_transformers(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"pac_checkpoint: {path} is not of the published layout: {error}") from None
    expected = model.state_dict()
    problems = [f"lacks {name}" for name in expected if name not in converted]
    problems += [f"has an unknown {name}" for name in converted if name not in expected]
    problems += [
        f"{name} is {tuple(converted[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"pac_checkpoint: {path} does not fit clip_model: {'; '.join(problems[:3])}{more}.")
    if all(torch.equal(converted[name].float(), expected[name].cpu().float()) for name in PROJECTIONS):
        raise UserError(
            f"pac_checkpoint: the projections in {path} are those of clip_model, so it was not trained as PAC is: with "
            "it the score would be CLIP-S. Use PAC's own file, or ask for clip-s."
        )
    return {name: tensor.float() for name, tensor in converted.items()}


def _check_activation(path, state, model, has_lora: bool) -> None:
    """Names and shapes are alike, but open_clip's ViT-L/14 has GELU and OpenAI's CLIPs have its quick approximation."""
    patches = state.get("visual.conv1.weight", torch.empty(0, 0, 0, 0)).shape
    expected = "quick_gelu" if has_lora or patches[::3] == (768, 32) else "gelu" if patches[::3] == (1024, 14) else None
    activation = model.config.vision_config.hidden_act
    if expected and activation != expected:
        right = {"gelu": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"}.get(expected, "OpenAI's CLIP of this shape")
        raise UserError(f"pac_checkpoint: {path} needs a clip_model with {expected}, not {activation}: {right}.")


def _without_lora(state: dict) -> dict:
    """The weights that PAC-S++ computes with (see read_pac_checkpoint)."""
    plain = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    for name in [name for name in state if name.endswith("lora_A")]:
        a, b = state[name].float(), state[name.removesuffix("A") + "B"].float()
        # "attn.in_proj_weight_lora_A" belongs to "attn.in_proj_weight", "attn.out_proj.lora_A" to "attn.out_proj.weight".
        whose = name.removesuffix("_lora_A") if name.endswith("_lora_A") else name.removesuffix("lora_A") + "weight"
        weight = plain[whose].float()
        added = (b @ a).view(weight.shape)
        if ".mlp." not in name:
            # The convolution's matrices are a kernel side as large as their rank.
            rank = len(a) // weight.shape[-1] if weight.dim() == 4 else len(a)
            plain[whose] = weight + added / rank
    return plain


def _to_transformers(state: dict) -> dict:
    converted = {}
    for name, tensor in state.items():
        if name in RENAMED:
            new = RENAMED[name]
            converted[new] = tensor.T if new in PROJECTIONS else tensor
            continue
        tower, block, suffix = name.partition("transformer.resblocks.")
        if not block or tower not in ("visual.", ""):
            raise UserError(f"'{name}' is not a parameter of a CLIP with a vision transformer")
        number, _, suffix = suffix.partition(".")
        layer = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}"
        if suffix.startswith("attn.in_proj_"):
            parameter = suffix.removeprefix("attn.in_proj_")
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}.self_attn.{projection}_proj.{parameter}"] = part
        else:
            module, _, parameter = suffix.rpartition(".")
            converted[f"{layer}.{RENAMED_IN_LAYER.get(module, module)}.{parameter}"] = tensor
    return converted
