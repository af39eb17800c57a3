"""Train on SageMaker: a training job that runs train.py, with its flags.

python sagemaker/launch.py --role ARN --bucket NAME [--recipe recipes/blip/flickr8k.yaml] [--num_train_epochs 2 ...]

Needs `pip install -r sagemaker/requirements.txt` on the machine that launches, nothing else of this repo. The same job
is made by SDK v3 (ModelTrainer) or, if that is installed instead, by v2 (PyTorch estimator).
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import yaml

import aws
import bundle
from aws import SDK, image_uris
from train_entry import HEAR_SIGTERM, METRICS

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "sagemaker/train_entry.py"
PYTORCH = "2.8.0"  # the newest image that both SDKs know
CHANNELS = {"dataset_name": "data", "image_dir": "images", "model_name_or_path": "model"}
SPLITS = ("train", "validation", "test")
# The flags of the transformers that a job installs (constraints.txt), for machines that launch without it.
TRAINER_FLAGS = ROOT / "sagemaker/trainer_flags.txt"
sys.path.insert(0, str(ROOT))


def main():
    args, words = read_flags()
    flags, recipe = flags_of_words(words), read_recipe(args.recipe)
    check_train_flags(args, words, {**recipe, **flags})
    hyperparameters, channels = job_of_flags(args, flags, recipe)
    session = aws.open_session(args)
    uploads = {name: files_of_channel(name, uri, channels) for name, uri in channels.items()}
    image = args.image_uri or image_uris.retrieve(
        "pytorch", session.boto_region_name, version=PYTORCH, py_version="py312",
        instance_type=args.instance_type, image_scope="training",
    )  # fmt: skip
    where = f"s3://{args.bucket}/{args.prefix}/{args.run_name}"
    with tempfile.TemporaryDirectory() as folder:
        files, size = bundle.write_job(Path(folder), args.recipe)
        print(f"source bundle: {files} files, {size / 1024:.0f} KiB", flush=True)
        channels = {name: upload(session, args, name, uri, uploads[name]) for name, uri in channels.items()}
        submit = submit_v3 if SDK == 3 else submit_v2
        submit(args, session, image, Path(folder), hyperparameters, channels, where)
    if not args.dry_run:
        print(f"model: {where}/output/JOB/output/model.tar.gz   checkpoints: {where}/checkpoints")
        print(f"deploy: python sagemaker/deploy.py --role {args.role} --bucket {args.bucket} --model_data MODEL")


def read_flags() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Every other flag is train.py's. Its dataset_name, image_dir and model_name_or_path may be s3:// URIs "
        "or local paths, which become channels.",
    )  # fmt: skip
    aws.account_flags(parser)
    add = parser.add_argument
    add("--recipe", help="A recipe of train.py, of this repo or your own.")
    for split in SPLITS:
        add(f"--{split}", metavar="S3_URI", help=f"S3 folder or local path of the {split} split, its captions inside.")
    add("--run_name", default=time.strftime("caption-%Y%m%d-%H%M%S"),
        help="Name of the run. A job with the name of a stopped run resumes from its checkpoints.")  # fmt: skip
    add("--instance_type", default="ml.g5.2xlarge", help="Machine. All of its GPUs are used.")
    add("--instance_count", type=int, default=1, help="Machines.")
    add("--volume_size", type=int, default=100, help="GB of disk for data and checkpoints.")
    add("--max_run", type=int, default=24 * 3600, help="Seconds of training after which the job is stopped.")
    add("--no_spot", dest="spot", action="store_false", help="No spot machine, which is cheaper but interruptible.")
    add("--max_wait", type=int, help="Seconds in all, including the wait for spot machines. Default: twice max_run.")
    add("--environment", nargs="+", default=[], type=aws.pair, metavar="KEY=VALUE",
        help="Environment variables of the job. Anyone who may describe the job can read them.")  # fmt: skip
    add("--encrypt_traffic", action="store_true", help="Encrypt traffic between machines.")
    add("--no_wait", action="store_true", help="Return once the job is submitted. Default: wait, and show its log.")
    args, words = parser.parse_known_args(aws.with_underscores(sys.argv[1:]))
    aws.check_account(args, "run_name")
    for name in ("instance_count", "volume_size", "max_run"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: it must be at least 1.")
    args.names = [action.dest for action in parser._actions]
    args.max_wait = args.max_wait or 2 * args.max_run
    if args.max_wait < args.max_run:
        raise ValueError(f"--max_wait {args.max_wait} includes the training: it must be at least --max_run.")
    return args, words


def flags_of_words(words: list[str]) -> dict[str, list[str]]:
    """The values of each of train.py's flags on the command line."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = values = [value] if equals else []
        elif not flags:
            raise ValueError(f"'{word}' is not a flag. A recipe is passed as --recipe, a data set as --dataset_name.")
        else:
            values.append(word)
    return flags


def read_recipe(path: str | None) -> dict:
    if not path:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"--recipe {path}: there is no such file.")
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe {path}: is not YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"--recipe {path}: must hold 'flag: value' lines.")
    return recipe


def check_train_flags(args, words: list[str], flags: dict) -> None:
    """Finds a mistake in train.py's flags before a machine is paid for: misspelt names everywhere, wrong values where
    transformers is installed."""
    with_values = importlib.util.find_spec("transformers") is not None
    if not with_values:
        from common import trainer_flags

        names = TRAINER_FLAGS.read_text(encoding="utf-8").split()
        trainer_flags.trainer_flags = lambda: dataclasses.make_dataclass(
            "TrainerFlags", [(n, str, None) for n in names]
        )
    from arguments import TRAIN_GROUPS
    from common import cli

    replaced = cli.replaced_flags(TRAIN_GROUPS)
    fields = {field.name for group in TRAIN_GROUPS for field in dataclasses.fields(group) if field.init}
    for name in flags:
        if name in replaced:
            raise ValueError(f"--{name} is not used here: {replaced[name]}.")
        if name.removeprefix("no_") not in fields and name not in fields:
            raise ValueError(cli.unrecognized(f"--{name}", fields.union(args.names)))
    of_files = {name for group in TRAIN_GROUPS for name in getattr(group, "FILES", ())} - set(CHANNELS)
    for name in of_files.intersection(flags):
        path = "".join(flags[name])
        if Path(path).exists() and not bundle.sent(path):
            raise ValueError(f"--{name} {path} is not sent to the job: only {', '.join(CHANNELS)} may be local paths.")
    if with_values:
        cli.check(TRAIN_GROUPS, [*([args.recipe] if args.recipe else []), *words])
    else:
        print("The names of train.py's flags were checked, their values not: transformers is not installed here.")


def job_of_flags(args, flags: dict[str, list[str]], recipe: dict) -> tuple[dict[str, str], dict[str, str]]:
    """(hyperparameters, channels): train.py's flags, except for those that name data. All values are strings; several
    values, and one that would be read as unset or as JSON, are a JSON list."""
    hyperparameters = {"recipe": "recipe.yaml"} if args.recipe else {}
    channels = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    local = {name: [str(recipe[name])] for name in CHANNELS if name in recipe and Path(str(recipe[name])).exists()}
    for name, values in {**local, **flags}.items():
        if name in CHANNELS and len(values) == 1 and (values[0].startswith("s3://") or Path(values[0]).exists()):
            channels[CHANNELS[name]] = values[0]
        elif not values and name.startswith("no_"):  # a switch's twin, which takes no value
            hyperparameters[name.removeprefix("no_")] = "false"
        elif not values:
            hyperparameters[name] = "true"
        elif len(values) > 1 or values[0] in ("", "null", "None") or values[0][0] in '["':
            hyperparameters[name] = json.dumps(values)
        else:
            hyperparameters[name] = values[0]
    if "data" in channels and len(channels.keys() & set(SPLITS)):
        raise ValueError("--dataset_name and --train, --validation, --test exclude each other.")
    return hyperparameters, channels


def files_of_channel(channel: str, uri: str, channels: dict[str, str]) -> dict[Path, str]:
    """What is uploaded of a local path, {file or folder: the folder that it comes into}. With a table of captions go the
    pictures that it names, unless they are a channel of their own."""
    path = Path(uri)
    if uri.startswith("s3://"):
        return {}
    if not path.exists():
        raise ValueError(f"{channel}: {uri} is neither an s3:// URI nor a local path.")
    reader = reading("text_rows")
    if path.is_dir() or path.suffix.lower() not in reader.ENDINGS or "images" in channels:
        return {path: ""}
    is_json = path.suffix.lower() == ".json"
    content = reader.read_json(path) if is_json else [row for row, _ in reader.table_objects(path)]
    names = {text for text in texts_of(content) if reader.IMAGE_NAME.fullmatch(Path(text).suffix) and "://" not in text}
    places = {name: place_below(path.parent, name) for name in sorted(names)}
    if missing := [name for name, place in places.items() if place is None]:
        raise ValueError(
            f"{uri} names {len(missing)} pictures that are not in its folder or below, the first: {missing[0]}. Name their "
            "folder with --image_dir."
        )
    return {path: "", **{path.parent / place: place.parent.as_posix() for place in places.values()}}


def reading(name: str):
    """A module of data/, from its file: the package around it imports torch."""
    spec = importlib.util.spec_from_file_location(f"data_{name}", ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts_of(content):
    """All strings of a JSON value."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from texts_of(value)


def place_below(folder: Path, name: str) -> Path | None:
    """Where in the folder or below it a file is that a table names, as train.py finds it: as written, or the only one of
    this name."""
    name = name.replace("\\", "/")
    places = [folder / name] if (folder / name).is_file() else files_below(folder).get(name.split("/")[-1], [])
    whole = folder.resolve()
    return places[0].resolve().relative_to(whole) if len(places) == 1 and whole in places[0].resolve().parents else None


@functools.cache
def files_below(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in map(Path, reading("walk").walk(folder)):
        files.setdefault(file.name, []).append(file)
    return files


def upload(session, args, channel: str, uri: str, files: dict[Path, str]) -> str:
    """The S3 URI of a channel; local files are uploaded."""
    if not files:
        return uri
    extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": args.kms_key} if args.kms_key else None
    key = f"{args.prefix}/{args.run_name}/input/{channel}"
    pictures = f" and the {len(files) - 1} pictures that it names" if len(files) > 1 else ""
    print(f"uploading {uri}{pictures} to s3://{args.bucket}/{key}", flush=True)
    for file, folder in files.items():
        prefix = "/".join([key, *([folder] if folder not in ("", ".") else [])])
        session.upload_data(str(file), bucket=args.bucket, key_prefix=prefix, extra_args=extra)
    return f"s3://{args.bucket}/{key}"


def submit_v3(args, session, image, code: Path, hyperparameters, channels, where) -> None:
    from sagemaker.core.shapes import CheckpointConfig, OutputDataConfig
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import Compute, InputData, MetricDefinition, Networking, SourceCode, StoppingCondition

    def hear_sigterm(params, **_):
        start = HEAR_SIGTERM.format(start="/opt/ml/input/data/sm_drivers/sm_train.sh")
        params["AlgorithmSpecification"]["ContainerEntrypoint"] = ["/bin/bash", "-c", start]
        del params["AlgorithmSpecification"]["ContainerArguments"]

    session.boto_session.events.register("provide-client-params.sagemaker.CreateTrainingJob", hear_sigterm)
    session.default_bucket_prefix = args.prefix
    kms = {"kms_key_id": args.kms_key} if args.kms_key else {}
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=args.role,
        training_image=image,
        base_job_name=args.run_name,
        source_code=SourceCode(
            source_dir=str(code), requirements="requirements.txt", command=f"$SM_PYTHON_CMD {ENTRY}"
        ),
        compute=Compute(
            instance_type=args.instance_type,
            instance_count=args.instance_count,
            volume_size_in_gb=args.volume_size,
            enable_managed_spot_training=args.spot,
            **({"volume_kms_key_id": args.kms_key} if args.kms_key else {}),
        ),
        networking=Networking(
            subnets=args.subnets or None,
            security_group_ids=args.security_group_ids or None,
            enable_inter_container_traffic_encryption=args.encrypt_traffic,
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=args.max_run,
            **({"max_wait_time_in_seconds": args.max_wait} if args.spot else {}),
        ),
        output_data_config=OutputDataConfig(s3_output_path=f"{where}/output", **kms),
        checkpoint_config=CheckpointConfig(s3_uri=f"{where}/checkpoints", local_path="/opt/ml/checkpoints"),
        environment=dict(args.environment),
        hyperparameters=hyperparameters,
        tags=[{"key": name, "value": value} for name, value in args.tags],
    ).with_metric_definitions([MetricDefinition(name=name, regex=regex) for name, regex in METRICS.items()])
    trainer.train(
        input_data_config=[InputData(channel_name=name, data_source=uri) for name, uri in channels.items()],
        wait=not (args.no_wait or args.dry_run),
    )


def submit_v2(args, session, image, code: Path, hyperparameters, channels, where) -> None:
    from sagemaker.pytorch import PyTorch

    estimator = PyTorch(
        sagemaker_session=session,
        role=args.role,
        image_uri=image,
        base_job_name=args.run_name,
        source_dir=str(code),
        entry_point=ENTRY,
        code_location=where,
        container_entry_point=["/bin/bash", "-c", HEAR_SIGTERM.format(start="-m start_with_right_hostname.sh train")],
        instance_type=args.instance_type,
        instance_count=args.instance_count,
        volume_size=args.volume_size,
        volume_kms_key=args.kms_key,
        use_spot_instances=args.spot,
        max_run=args.max_run,
        max_wait=args.max_wait if args.spot else None,
        subnets=args.subnets or None,
        security_group_ids=args.security_group_ids or None,
        encrypt_inter_container_traffic=args.encrypt_traffic,
        output_path=f"{where}/output",
        output_kms_key=args.kms_key,
        checkpoint_s3_uri=f"{where}/checkpoints",
        checkpoint_local_path="/opt/ml/checkpoints",
        metric_definitions=[{"Name": name, "Regex": regex} for name, regex in METRICS.items()],
        environment=dict(args.environment) or None,
        hyperparameters=hyperparameters,
        tags=aws.tags_of(args) or None,
        debugger_hook_config=False,
        disable_profiler=True,
    )
    estimator.fit(channels or None, wait=not (args.no_wait or args.dry_run))


if __name__ == "__main__":
    aws.run(main)
