"""Weight files: safetensors, or the tensors of a .bin, and nothing else; every weight must be found and used."""

import contextlib
import json
import logging
import os
import pickle
import re
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

from common.errors import UserError

logger = logging.getLogger(__name__)

# Otherwise transformers asks a service of the Hub to convert a .bin repository in the background.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

# Buffers that older releases saved and newer ones compute: not weights of any captioner.
BUFFERS = re.compile(
    r"(.*\.)?(position_ids|inv_freq|original_inv_freq|rotary_emb\.\w+|masked_bias|attn\.bias|relative_position_index|"
    r"embed_positions\._float_tensor|embed_positions\.weights|num_batches_tracked|qk_rel_pos_index)"
)

# Of cached_file: None for a file that is not there.
MAY_BE_MISSING = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

# Those that captions depend on.
MODEL_FILES = re.compile(
    r"(?!training_args).*\.(safetensors|onnx|data|bin|model|jinja)|merges\.txt|vocab\.\w+|"
    r"((adapter_|generation_|preprocessor_|processor_|tokenizer_)?config|tokenizer|special_tokens_map|added_tokens|"
    r"chat_template)\.json"
)


def read_weights(model_class, source, *, revision: str = "main", unread: str = "", **options):
    """`model_class.from_pretrained(source)` with all its weights, from a local folder or the Hub.

    Safetensors if there are any, else `pytorch_model.bin`, from which torch reads tensors only and runs no code. Single
    files or shards. Names of older releases are mapped as the library maps them. `unread`: a regular expression of the
    weights that the model has but never reads. `options` are those of `from_pretrained`. ValueError, in one line, if the
    files are damaged, hold anything but tensors, lack a weight, or hold one that the model does not have; OSError if
    there is no model.
    """
    for file in Path(source).glob("*.safetensors"):
        if not os.access(file, os.R_OK):  # the library says that there is no such file
            raise UserError(f"{file} cannot be read: permission denied.")
    use_safetensors = _has(source, revision, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not use_safetensors and _has(source, revision, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        logger.info("%s has no safetensors: its %s is read, tensors only", source, WEIGHTS_NAME)
    else:
        use_safetensors = True
    with errors_in_one_line(source):
        model, info = model_class.from_pretrained(
            source, revision=revision, use_safetensors=use_safetensors, output_loading_info=True, **options
        )
    check_keys(source, type(model).__name__, info["missing_keys"], info["unexpected_keys"], unread)
    return model


@contextlib.contextmanager
def errors_in_one_line(source):
    """Turns errors in reading the weight files of `source` into a ValueError in one line."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"The weights in {source} are damaged ({error}): copy or download them again.") from None
    except (pickle.UnpicklingError, EOFError) as error:
        raise UserError(_refusal(source, error)) from None
    except RuntimeError as error:
        if re.search("PytorchStreamReader|central directory", str(error)):
            raise UserError(_refusal(source, error)) from None
        if re.search("size mismatch|ignore_mismatched_sizes", str(error)):
            raise UserError(
                f"{source}: its weights have other shapes than its config says. Copy both from one source."
            ) from None
        raise


def check_keys(source, model: str, missing, unexpected, unread: str = "") -> None:
    """ValueError if weights are missing from `source`, or if it holds some that `model` does not have."""

    def of_weight(names):
        return sorted(n for n in names if not BUFFERS.fullmatch(n) and not re.fullmatch(unread, n))

    missing, unexpected = of_weight(missing), of_weight(unexpected)
    if missing:
        other = f", and holds {len(unexpected)} that it does not know (first: {unexpected[0]})" if unexpected else ""
        raise UserError(
            f"{source} lacks {len(missing)} weights of {model} (first: {missing[0]}){other}: "
            "it is a checkpoint of another kind of model, or of another release that names them otherwise."
        )
    if unexpected:
        raise UserError(
            f"{source} holds {len(unexpected)} weights that {model} has no place for (first: {unexpected[0]}): its "
            "config.json describes another model than its weights."
        )


def fingerprint(source, revision: str = "main") -> str:
    """16 hex digits of a model's files, weights and what belongs to them, and of an adapter's base model: the same
    wherever the model lies, and others once it is trained further. `source` is a local folder or an id of the Hub."""
    configs = ("config.json", "adapter_config.json")
    files = (cached_file(str(source), name, revision=revision, **MAY_BE_MISSING) for name in configs)
    folder, digest = Path(next(filter(None, files), Path(source, "none"))).parent, xxhash.xxh3_64()
    for file in sorted(file for file in folder.glob("*") if MODEL_FILES.fullmatch(file.name)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter["base_model_name_or_path"], adapter.get("revision") or "main"
        digest.update(fingerprint(*base).encode())
    return digest.hexdigest()


def _has(source, revision: str, *names: str) -> bool:
    """Whether one of the files is in a local folder or on the Hub."""
    return any(cached_file(str(source), name, revision=revision, **MAY_BE_MISSING) for name in names)


def _refusal(source, error: Exception) -> str:
    reason = str(error)
    refused = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL|callable)", reason)
    if isinstance(error, pickle.UnpicklingError) and refused:
        name = re.search(r"(?:GLOBAL|class|operand|callable)(\s+)([\w.]+)|$", reason)[2]
        return (
            f"The .bin weights in {source} hold more than tensors{f' ({name})' if name else ''}: a file that could run "
            "code is not loaded. Ask its author for safetensors."
        )
    return (
        f"The .bin weights in {source} are damaged, or a Git LFS pointer in their place "
        f"({reason.partition(chr(10))[0][:80] or type(error).__name__}): copy or download them again."
    )
