"""The model card: README.md of a model folder, made from the files that the run left there, nothing by hand."""

import hashlib
import json
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)

from common.files import write_text
from common.logs import duration
from common.publish import without_local_paths
from data.seen import in_words
from metrics.names import SCORES, is_shown, score_named
from models.adapters import describe
from models.families import base_model, family_of
from models.onnx_model import OnnxModel
from reports.snippet import snippet

CURVES = (
    "![Loss, learning rate and validation scores by training step; a dotted line marks the checkpoint kept]"
    "(training_curves.png)"
)


def run_facts(trainer, splits: dict, train_metrics: dict, scored: list) -> dict:
    """What is known at the end of a training run, for run.json: sizes, time, memory, best checkpoint, examples of the last
    split that was scored, language."""
    state, model = trainer.state, base_model(trainer.model)
    config = model.config
    model_facts = {
        "class": type(model).__name__.removeprefix("FSDP"),  # what torch prepends to a class whose weights are sharded
        "adapter": describe(trainer.model),
        "license": family_of(config).license,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "image_size": getattr(getattr(config, "vision_config", getattr(config, "encoder", None)), "image_size", None),
    }
    training = {
        "steps": state.global_step,
        "epochs": state.epoch,
        "processes": trainer.accelerator.num_processes,
        "precision": str(trainer.args.autocast_dtype or "float32").removeprefix("torch."),
        "best_step": state.best_global_step,
        "best_validation_score": state.best_metric,
        **train_metrics,
    }
    sizes = {name: _sizes(split) for name, split in splits.items()}
    facts = {
        "data": sizes,
        "model": model_facts,
        "training": training,
        "examples": scored[-1].examples() if scored else [],
    }
    return facts | {"language": trainer.caption_language}


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(run.json, the scores of its test and validation split) of a folder, if they are there."""
    scores = (_read(folder / "coco_metrics.json"), _read(folder / "validation/coco_metrics.json"))
    return _read(folder / "run.json"), [score for score in scores if score]


def write_card(folder: Path, run: dict, reported: list[dict], captioner, repo_id: str | None = None) -> None:
    """README.md of `folder`. run: what run.json holds. reported: what coco_metrics.json holds, of each split. captioner:
    the folder's model with the settings that these were captioned with."""
    precision = next((scores["generation"]["precision"] for scores in reported if "generation" in scores), "float32")
    base = _base(run.get("flags", {}))
    run, reported = without_local_paths(run), without_local_paths(reported)
    flags = run.get("flags", {})
    name = repo_id or folder.resolve().name
    dataset = flags.get("dataset_name")
    on_hub = bool(dataset) and is_on_hub(dataset)
    metadata = ModelCardData(
        language=run.get("language"),
        license=run.get("license") or run.get("model", {}).get("license") or "other",
        base_model=base,
        datasets=[dataset] if on_hub else None,
        pipeline_tag="image-to-text",
        library_name="onnx" if isinstance(captioner.model, OnnxModel) else "transformers",
        tags=["image-captioning"],
        model_name=name if reported else None,
        eval_results=_eval_results(reported) if reported else None,
    )
    sections = [
        f"# {name}",
        _summary(run, base),
        "## How to use it",
        f"```python\n{snippet(name, captioner, precision)}\n```",
        "## Scores",
        _scores(reported) or "Not scored yet: `python evaluate.py` scores it.",
        "## Examples",
        _examples(run) or "None recorded.",
        "## Intended use, limits and risks",
        _limits(flags, reported),
        "## Training",
        (f"{CURVES}\n\n" if (folder / "training_curves.png").is_file() else "") + _training(run, flags),
    ]
    generated = dict(zip(sections[::2], sections[1::2], strict=True))
    before = folder / "README.md"
    text = before.read_text(encoding="utf-8") if before.is_file() else ""
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{merge_sections(text, generated)}")
    write_text(folder / "README.md", str(card))
    write_eval_results(folder, reported)


def is_on_hub(dataset: str) -> bool:
    return dataset.count("/") == 1 and not Path(dataset).exists()


def write_eval_results(folder: Path, reported: list[dict]) -> None:
    """.eval_results/DATASET.yaml of each data set of the Hub that was scored, from which the Hub shows scores on the pages of
    model and data set (https://huggingface.co/docs/hub/eval-results). `reported`: what coco_metrics.json holds, of each split."""
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for scores in filter(lambda scores: is_on_hub(scores["dataset_name"]), reported):
        notes = f"{scores['split']} split, {scores['counts']['images']} images"
        for score in SCORES.values():
            if score.hub_id and scores.get(score.name) is not None:
                entry = EvalResultEntry(
                    scores["dataset_name"], f"{scores['split']}_{score.name}", round(scores[score.name], 4), notes=notes
                )
                by_dataset.setdefault(entry.dataset_id, []).append(entry)
    for dataset, entries in by_dataset.items():
        file = folder / ".eval_results" / f"{dataset.replace('/', '_')}.yaml"
        file.parent.mkdir(exist_ok=True)
        write_text(file, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def merge_sections(text: str, generated: dict[str, str]) -> str:
    """The card's body: `generated` ({heading: text}), each ending in a comment with its hash, but with what a person
    added or changed in `text`, the existing card. A section whose hash does not match its text is a person's."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    parts, merged, written_by_hand = re.split(r"(?m)^(?=#{1,2} )", text), [], "<!-- generated" not in text
    if written_by_hand and (
        "## Captions it gives" in text or "## Examples" in text
    ):  # by a version without these comments
        parts = []
    left = dict(generated)
    for part in filter(str.strip, parts):
        heading, _, body = part.strip().partition("\n")
        section = re.fullmatch(r"(.*?)\s*<!-- generated (\w+) -->", body.strip(), re.DOTALL)
        unchanged = section and _hash(section[1].strip()) == section[2]
        if unchanged and (heading in left or heading.startswith("# ")):
            heading = heading if heading in left else next(iter(generated))  # the title names the folder or repository
            merged.append(_section(heading, left.pop(heading)))
        elif not unchanged:
            left.pop(heading, None)
            merged.append(part.strip())
    merged += [_section(heading, body) for heading, body in left.items()]
    return "\n\n".join(merged) + "\n"


def _section(heading: str, body: str) -> str:
    return f"{heading}\n\n{body.strip()}\n\n<!-- generated {_hash(body.strip())} -->"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _base(flags: dict) -> str | None:
    """The Hub id of the model that training started from, if it was one."""
    name = flags.get("model_name_or_path")
    return None if not name or flags.get("model_config") or Path(name).exists() else name


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _shown(dataset_name: str) -> str:
    """A Hub id as it is; of a local path the last part, as the rest is private."""
    return Path(dataset_name).name if Path(dataset_name).exists() else dataset_name


def _sizes(split) -> dict:
    try:
        return {"images": len(split), "captions": sum(len(captions) for captions in split["captions"])}
    except TypeError:  # a stream has no length
        return {"images": None, "captions": None}


def _eval_results(reported: list[dict]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-to-text",
            task_name="Image captioning",
            dataset_type=_shown(scores["dataset_name"]),
            dataset_name=_shown(scores["dataset_name"]),
            dataset_split=scores["split"],
            metric_type=score.hub_id,
            metric_name=score.label,
            metric_value=round(scores[score.name], 4),
        )
        for scores in reported
        for score in SCORES.values()
        if score.hub_id and scores.get(score.name) is not None
    ]


def _summary(run: dict, base: str | None) -> str:
    flags, model, sizes = run.get("flags", {}), run.get("model", {}), run.get("data", {})
    if not flags:
        return "An image captioner: it writes a caption for an image."
    start = f"fine-tuned from `{base}`" if base else "trained"
    if flags.get("model_config"):
        start = "trained from random weights"
    millions = f"{model['parameters'] / 1e6:.1f} million parameters, " if model else ""
    counted = {
        name: ["a stream" if n is None else f"{n:,}" for n in (s["images"], s["captions"])] for name, s in sizes.items()
    }
    rows = "".join(f"| {name} | {images} | {captions} |\n" for name, (images, captions) in counted.items())
    splits = "No image is in two splits: images are identified by name and by the bytes of their files."
    if flags.get("streaming"):
        splits = "The data were read as a stream: whether an image is in two splits was not checked."
    return (
        f"An image captioner ({millions}`{model.get('class', 'model')}`), {start} on `{_shown(flags['dataset_name'])}`.\n\n"
        f"| split | images | captions |\n|---|---|---|\n{rows}\n"
        f"{splits}"
    )


def _scores(reported: list[dict]) -> str:
    parts = []
    for scores in reported:
        rows = []
        for key, label in [(score.name, score.label) for score in SCORES.values() if score.name != "scene_facts"]:
            if scores.get(key) is None:
                if key in scores.get("unavailable", {}) and is_shown(key, scores):
                    reason = scores["unavailable"][key]
                    rows.append(f"| {label} | not computed | {_cell(reason)} |")
                continue
            low, high = scores.get("intervals", {}).get(key) or (None, None)
            rows.append(f"| {label} | {scores[key]:.4f} | {f'{low:.4f} to {high:.4f}' if low is not None else ''} |")
        for metric, weights in scores.get("clip_weights", {}).items():
            for key in (metric, f"Ref{metric}"):
                low, high = scores["intervals"].get(key) or (None, None)
                label = f"{key} (weights {weights['sha256'][:12]})"
                rows.append(
                    f"| {label} | {scores[key]:.4f} | {f'{low:.4f} to {high:.4f}' if low is not None else ''} |"
                )
        facts = scores.get("scene_facts")
        if facts:
            rows.append(f"| Scene facts | {facts['scene_facts']:.4f} | |")
        generation = ", ".join(f"{k} {v}" for k, v in scores["generation"].items() if v not in (None, ""))
        parts.append(
            f"On the {scores['split']} split of `{_shown(scores['dataset_name'])}` ({scores['counts']['images']} images, one "
            f"caption each, all references; no reference is ever shown to the model)."
            f"{' ' + in_words(scores['seen']) if 'seen' in scores else ''}\n\n"
            "| metric | score | 95 % interval over images |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
            f"Generated with: {_cell(generation)}. sacreBLEU signature: `{scores.get('sacrebleu_signature')}`. "
            f"Dataset fingerprint: `{scores.get('dataset_fingerprint')}`."
        )
    return "\n\n".join(parts)


def _examples(run: dict) -> str:
    rows = [
        f"| {_cell(example['image_id'])} | {_cell(example['caption'])} | {_cell('; '.join(example['references'][:2]))} |"
        for example in run.get("examples", [])
    ]
    return "\n".join(["| image | caption | references |", "|---|---|---|", *rows]) if rows else ""


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table, with all markup escaped."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split()))


def _limits(flags: dict, reported: list[dict]) -> str:
    facts = next((s["corpus"] for s in reported if "corpus" in s), None)
    sentence = ""
    if facts:
        sentence = (
            f" On the {reported[0]['split']} split {math.floor(1000 * facts['distinct']) / 1000:.1%} of its captions are distinct and "
            f"{facts['bad_endings']:.1%} end in the middle of a phrase."
        )
    return (
        "For describing pictures like those it was trained on, as a draft that a person checks. A caption can name "
        "things that are not there, miscount, and guess at gender, age or occupation from looks, as its training "
        f"captions do; it should not be used to identify or judge people, nor where a wrong caption does harm.{sentence} "
        "N-gram scores reward captions that sound like the references, which is not the same as being right."
    )


def _training(run: dict, flags: dict) -> str:
    training, lines = run.get("training"), []
    if training:
        hardware = run["hardware"]
        device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']} ({hardware['cores']} cores)"
        gpu_memory = training.get("train_peak_gpu_memory_gib")
        peak = f"{gpu_memory} GiB on the GPU" if gpu_memory else f"{training['train_peak_host_memory_gib']} GiB"
        epochs = f"{training['epochs']:.2f} epochs, " if training["epochs"] else ""  # unknown of a stream's first one
        lines.append(
            f"{training['steps']:,} steps, {epochs}{duration(training['train_runtime'])} "
            f"(of the last start, if it was resumed) in {training['processes']} process"
            f"{'es' * (training['processes'] != 1)} on {device}, "
            f"{training['precision']}, peak memory {peak}. "
        )
        if training.get("best_step"):
            best = score_named(flags["metric_for_best_model"].removeprefix("eval_")).label
            lines.append(
                f"The checkpoint kept is that of step {training['best_step']:,}: the best {best} "
                f"on the validation split ({training['best_validation_score']:.4f})."
            )
    if adapter := run.get("model", {}).get("adapter"):
        layers = ", ".join(f"{count} x `{name}`" for name, count in adapter["layers"].items())
        whole = f"; trained in full: {', '.join(adapter['modules_to_save'])}" if adapter["modules_to_save"] else ""
        lines.append(
            f"\n\nAn adapter (LoRA) of rank {adapter['r']}, alpha {adapter['lora_alpha']}, dropout "
            f"{adapter['lora_dropout']}, on {layers}{whole}."
        )
    if run.get("lengths"):
        lines.append(f"\n\nLengths: {run['lengths']['in_words']}.")
    if not flags:
        return "Not recorded."
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    flags = {**flags, "dataset_name": _shown(flags["dataset_name"])}
    settings = {name: value for name, value in sorted(flags.items()) if value not in (None, "", [])}
    rows = "\n".join(f"| {name} | {_cell(str(value))} |" for name, value in settings.items())
    lines.append(f"\n\nCommit `{run['commit']}`; {versions}.\n\n```\n{run['command']}\n```\n\n")
    lines.append(f"<details><summary>Every setting</summary>\n\n| setting | value |\n|---|---|\n{rows}\n\n</details>")
    return "".join(lines)
