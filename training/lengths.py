"""How long captions are: what of them is learnt, and how long a caption may become. Both follow the training captions."""

import json
import logging
import math
from itertools import chain, islice
from pathlib import Path

from datasets import IterableDataset
from PIL import Image

from data.prompts import PROMPTS
from data.text_augmentation import clean
from data.tokens import check_captions_can_be_written
from training.memory import PICTURE

logger = logging.getLogger(__name__)

PUBLISHED = 40  # tokens of a caption with its prompt, start and end, in BLIP's own training
LOOKED_AT, OF_A_STREAM = 100_000, 20_000  # captions
CUT = 0.01  # the share of the training captions that may be longer than what is learnt


def fit_lengths(captioner, records, data_args, generation_args, checkpoint: str | None) -> dict:
    """Set max_txt_len and max_new_tokens where these flags were left out, in place, and the captioner's max_new_tokens:
    PUBLISHED and the captioner's own if all but CUT of the training captions fit, else as long as all but CUT need, and
    the model has positions for. A run that goes on from `checkpoint` keeps what it began with. Says in one line how many
    captions are cut.

    Returns {"max_txt_len", "max_new_tokens", "longest", "cut", "captions", "in_words"}, for run.json: both lengths and the
    longest training caption's, with prompt, start and end, in tokens; how many captions are cut, of how many that were
    looked at; and all this as a sentence. UserError if the tokenizer cannot write the captions."""
    captions = _captions(records)
    if "clean" in data_args.augment_text:
        captions = list(map(clean, captions))
    check_captions_can_be_written(captioner.processor.tokenizer, captions)
    images = captioner.collator
    counts = sorted(map(len, images.target_ids(captions)))
    needed, prompt = counts[math.ceil((1 - CUT) * len(counts)) - 1], _longest_prompt(records, images)
    before = images.words_in(prompt)
    generated = captioner.settings["max_new_tokens"]
    positions = limit = None
    if needed > min(PUBLISHED - before, generated):
        positions = getattr(captioner.model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        limit = positions - images.inputs([Image.new("RGB", PICTURE)], [prompt])["input_ids"].shape[1]
    learnt = min(needed, limit or needed)
    begun = _flags(checkpoint)
    asked = data_args.max_txt_len or begun.get("max_txt_len")
    data_args.max_txt_len = asked or max(PUBLISHED, before + learnt)
    written = max(generated, min(learnt, data_args.max_txt_len - before))
    if begun:  # earlier versions recorded None for the captioner's own
        written = begun.get("max_new_tokens") or generated
    generation_args.max_new_tokens = generation_args.max_new_tokens or written
    captioner.asked["max_new_tokens"] = captioner.settings["max_new_tokens"] = generation_args.max_new_tokens
    captioner.save_settings()
    lengths = {
        "max_txt_len": data_args.max_txt_len,
        "max_new_tokens": generation_args.max_new_tokens,
        "longest": before + counts[-1],
        "cut": sum(count > data_args.max_txt_len - before for count in counts),
        "captions": len(counts),
    }
    limit = f" (the model has {positions:,} positions)" if not asked and learnt < needed else ""
    lengths["in_words"] = (
        f"up to {lengths['max_txt_len']} tokens of a training caption (max_txt_len){limit}, and of a generated one up to "
        f"{lengths['max_new_tokens']} (max_new_tokens); of {'the first ' * isinstance(records, IterableDataset)}"
        f"{len(counts):,} training captions, the longest of {lengths['longest']} tokens, {lengths['cut']:,} are cut"
        f"{', and the model does not learn where these end' * (lengths['cut'] > 0)}"
    )
    level = logging.WARNING if lengths["cut"] > CUT * len(counts) else logging.INFO
    logger.log(level, "lengths: %s", lengths["in_words"])
    return lengths


def _captions(records) -> list[str]:
    """The captions that are looked at: of a stream the first, of a large table every n-th."""
    if isinstance(records, IterableDataset):
        return list(islice((caption for row in records for caption in row["captions"]), OF_A_STREAM))
    captions = list(chain.from_iterable(records["captions"][:]))
    return captions[:: math.ceil(len(captions) / LOOKED_AT)]


def _longest_prompt(records, images) -> str:
    """The longest of the rows' own prompts that are looked at, or the one of all rows."""
    if PROMPTS not in (records.column_names or ()):
        return images.prompt
    rows = islice(records.select_columns([PROMPTS]), OF_A_STREAM)
    prompts = {prompt or images.prompt for row in rows for prompt in row[PROMPTS]}
    return max(prompts, key=len, default=images.prompt)


def _flags(checkpoint: str | None) -> dict:
    """The flags of the run that `checkpoint` is of, if it recorded them."""
    run = Path(checkpoint or "", "../run.json")
    return json.loads(run.read_text(encoding="utf-8"))["flags"] if checkpoint and run.is_file() else {}
