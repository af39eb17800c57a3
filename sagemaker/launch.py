"""Train on SageMaker: a training job that runs train.py, with its flags.

python sagemaker/launch.py --role ARN --bucket NAME [--recipe recipes/blip/flickr8k.yaml] [--num_train_epochs 2 ...]

Needs `pip install -r sagemaker/requirements.txt` on the machine that launches, nothing else of this repo. The same job
is made by SDK v3 (ModelTrainer) or, if that is installed instead, by v2 (PyTorch estimator).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import aws
import bundle
from aws import SDK, image_uris
from train_entry import HEAR_SIGTERM, METRICS

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "sagemaker/train_entry.py"
PYTORCH = "2.8.0"  # the newest image that both SDKs know
CHANNELS = {"dataset_name": "data", "image_dir": "images", "model_name_or_path": "model"}


def main():
    args, train_flags = read_flags()
    check_train_flags(args.recipe, train_flags)
    hyperparameters, channels = job_of_flags(args, train_flags)
    session = aws.open_session(args)
    image = args.image_uri or image_uris.retrieve(
        "pytorch", session.boto_region_name, version=PYTORCH, py_version="py312",
        instance_type=args.instance_type, image_scope="training",
    )  # fmt: skip
    where = f"s3://{args.bucket}/{args.prefix}/{args.run_name}"
    with tempfile.TemporaryDirectory() as folder:
        files, size = bundle.write_job(Path(folder), args.recipe)
        print(f"source bundle: {files} files, {size / 1024:.0f} KiB", flush=True)
        channels = {name: upload(session, args, name, uri) for name, uri in channels.items()}
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
    for split in ("train", "validation", "test"):
        add(f"--{split}", metavar="S3_URI", help=f"S3 folder or local path of the {split} split, its captions inside.")
    add("--run_name", default=time.strftime("caption-%Y%m%d-%H%M%S"),
        help="Name of the run. A job with the name of a stopped run resumes from its checkpoints.")  # fmt: skip
    add("--instance_type", default="ml.g5.2xlarge", help="Machine. All of its GPUs are used.")
    add("--instance_count", type=int, default=1, help="Machines.")
    add("--volume_size", type=int, default=100, help="GB of disk for data and checkpoints.")
    add("--max_run", type=int, default=24 * 3600, help="Seconds of training after which the job is stopped.")
    add("--spot", action=argparse.BooleanOptionalAction, default=True, help="Spot machines: cheaper, interruptible.")
    add("--max_wait", type=int, help="Seconds in all, including the wait for spot machines. Default: twice max_run.")
    add("--environment", nargs="+", default=[], type=aws.pair, metavar="KEY=VALUE",
        help="Environment variables of the job. Anyone who may describe the job can read them.")  # fmt: skip
    add("--encrypt_traffic", action="store_true", help="Encrypt traffic between machines.")
    add("--no_wait", action="store_true", help="Return once the job is submitted. Default: wait, and show its log.")
    args, train_flags = parser.parse_known_args()
    aws.check_account(args)
    args.max_wait = args.max_wait or 2 * args.max_run
    if args.max_wait < args.max_run:
        raise ValueError(f"--max_wait {args.max_wait} includes the training: it must be at least --max_run.")
    return args, train_flags


def check_train_flags(recipe: str | None, words: list[str]) -> None:
    """A misspelt flag is an error here, before a machine is paid for, if transformers is installed to check it."""
    if recipe and not Path(recipe).is_file():
        raise ValueError(f"--recipe {recipe}: there is no such file.")
    sys.path.insert(0, str(ROOT))
    try:
        from arguments import TRAIN_GROUPS
        from common import cli
    except ImportError:
        print("train.py's flags are checked in the job only: its requirements are not installed here.")
        return
    cli.check(TRAIN_GROUPS, [*([recipe] if recipe else []), *words])


def job_of_flags(args, words: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(hyperparameters, channels): train.py's flags, except for those that name data. All values are strings; a
    flag with several values is a JSON list."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name.replace("-", "_")] = values = [value] if equals else []
        elif not flags:
            raise ValueError(f"'{word}' is not a flag. A recipe is passed as --recipe {word}.")
        else:
            values.append(word)
    hyperparameters = {"recipe": "recipe.yaml"} if args.recipe else {}
    channels = {split: getattr(args, split) for split in ("train", "validation", "test") if getattr(args, split)}
    for name, values in flags.items():
        if name in CHANNELS and len(values) == 1 and (values[0].startswith("s3://") or Path(values[0]).exists()):
            channels[CHANNELS[name]] = values[0]
        else:
            hyperparameters[name] = json.dumps(values) if len(values) > 1 else "".join(values) or "true"
    if "data" in channels and len(channels.keys() & {"train", "validation", "test"}):
        raise ValueError("--dataset_name and --train, --validation, --test exclude each other.")
    return hyperparameters, channels


def upload(session, args, channel: str, uri: str) -> str:
    """The S3 URI of a channel; a local path is uploaded."""
    if uri.startswith("s3://"):
        return uri
    if not Path(uri).exists():
        raise ValueError(f"{channel}: {uri} is neither an s3:// URI nor a local path.")
    extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": args.kms_key} if args.kms_key else None
    key = f"{args.prefix}/{args.run_name}/input/{channel}"
    print(f"uploading {uri} to s3://{args.bucket}/{key}", flush=True)
    return session.upload_data(uri, bucket=args.bucket, key_prefix=key, extra_args=extra)


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
