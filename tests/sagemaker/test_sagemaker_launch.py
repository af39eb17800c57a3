"""launch.py and deploy.py in an environment of each SDK, against moto's AWS: what they request, recorded on the wire."""

import base64
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
from conftest import ROOT
from sagemaker_envs import SECRETS, free_port, program, wait_for

from common.trainer_flags import trainer_flags

sys.path.insert(0, str(ROOT / "sagemaker"))
import launch

import aws as launch_aws
import train_entry

ROLE = "arn:aws:iam::123456789012:role/sagemaker"
KEY = "arn:aws:kms:us-east-1:123456789012:key/0123"
ACCOUNT = ["--role", ROLE, "--bucket", "captions", "--tags", "team=vision", "cost=low", "--kms_key", KEY,
           "--subnets", "subnet-1", "subnet-2", "--security_group_ids", "sg-1"]  # fmt: skip


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    """The address of a running moto server that records, with a bucket."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto")
    process = subprocess.Popen(
        [program("v3", "moto_server"), "-p", str(port)],
        env={**os.environ, "MOTO_RECORDER_FILEPATH": str(log / "recording")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/moto-api/", process, 60)
        send(f"{address}/captions", "PUT")
        yield address
    finally:
        process.terminate()
        process.wait()


def send(url, method, body=None):
    owner = {"Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"}
    with urllib.request.urlopen(urllib.request.Request(url, body, owner, method=method), timeout=30) as answer:
        return answer.read()


def run(env, script, *words, address=None, **environment):
    variables = {**os.environ, **SECRETS, **environment, **({"AWS_ENDPOINT_URL": address} if address else {})}
    variables["SAGEMAKER_VALIDATE_ROLE"] = "false"  # moto has no SimulatePrincipalPolicy
    for name in ("PYTHONPATH", "AWS_CA_BUNDLE"):
        variables.pop(name, None)
    command = [program(env), str(ROOT / "sagemaker" / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=200)


def requests_of(address, env, script, *words):
    """{operation: its request} of all SageMaker calls that the script makes."""
    send(f"{address}/moto-api/recorder/reset-recording", "POST")
    send(f"{address}/moto-api/recorder/start-recording", "POST")
    result = run(env, script, *words, address=address)
    send(f"{address}/moto-api/recorder/stop-recording", "POST")
    assert result.returncode == 0, result.stderr + result.stdout
    calls = {}
    for line in send(f"{address}/moto-api/recorder/download-recording", "GET").decode().splitlines():
        call = json.loads(line)
        target = {name.lower(): value for name, value in call["headers"].items()}.get("x-amz-target", "")
        if target.startswith(("SageMaker.", "AnyScaleFrontendService.")):
            calls[target.split(".")[1]] = json.loads(base64.b64decode(call["body"]))
    return calls, result


VALIDATE = """
import json, sys, botocore.session, botocore.validate
session = botocore.session.get_session()
for service, operation, request in json.load(sys.stdin):
    model = session.get_service_model(service).operation_model(operation)
    report = botocore.validate.ParamValidator().validate(request, model.input_shape)
    assert not report.has_errors(), report.generate_report()
"""


def validate(calls: dict) -> None:
    """Against botocore's own model of the service, patterns and lengths of the entry point included."""
    scaling = ("RegisterScalableTarget", "PutScalingPolicy")
    triples = [("application-autoscaling" if name in scaling else "sagemaker", name, c) for name, c in calls.items()]
    command = [program("v3"), "-c", VALIDATE]
    result = subprocess.run(command, input=json.dumps(triples), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


LAUNCH = [*ACCOUNT, "--recipe", "recipes/blip/flickr8k.yaml", "--run_name", "flickr", "--instance_count", "2",
          "--train", "s3://data/train", "--validation", "s3://data/validation", "--environment", "HF_HUB_OFFLINE=1",
          "--model_name_or_path", "s3://models/blip/", "--max_run", "3600", "--no_wait", "--encrypt_traffic",
          "--num_train_epochs", "2", "--augment", "flip", "randaugment:2:5", "--skip_bad_samples"]  # fmt: skip


@pytest.fixture(scope="module")
def jobs(moto):
    return {env: requests_of(moto, env, "launch.py", *LAUNCH)[0]["CreateTrainingJob"] for env in ("v2", "v3")}


def normal(job: dict) -> dict:
    """What the job is: without its generated name, and without how each SDK hands over code and entry point."""
    job = json.loads(json.dumps(job))
    algorithm = job["AlgorithmSpecification"]
    del job["TrainingJobName"], algorithm["ContainerEntrypoint"]
    algorithm.pop("ContainerArguments", None)
    algorithm.pop("EnableSageMakerMetricsTimeSeries", None)  # off without it, and v2 sends that it is off
    job.pop("ProfilerConfig", None)  # v2 says that there is to be no profiler
    job["HyperParameters"] = {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in job["HyperParameters"].items()
        if not name.startswith("sagemaker_")
    }
    channels = [channel for channel in job["InputDataConfig"] if channel["ChannelName"] not in ("code", "sm_drivers")]
    for channel in channels:
        channel.pop("InputMode", None)  # File, as the algorithm's TrainingInputMode says
    job["InputDataConfig"] = sorted(channels, key=lambda channel: channel["ChannelName"])
    return job


def test_both_sdks_request_the_same_job(jobs):
    assert normal(jobs["v2"]) == normal(jobs["v3"])


def test_the_job_is_what_was_asked_for(jobs):
    job = normal(jobs["v3"])
    assert job["RoleArn"] == ROLE
    assert job["HyperParameters"] == {
        "recipe": "recipe.yaml", "num_train_epochs": "2", "augment": '["flip", "randaugment:2:5"]',
        "skip_bad_samples": "true",
    }  # fmt: skip
    assert {c["ChannelName"]: c["DataSource"]["S3DataSource"]["S3Uri"] for c in job["InputDataConfig"]} == {
        "train": "s3://data/train", "validation": "s3://data/validation", "model": "s3://models/blip/",
    }  # fmt: skip
    assert job["EnableManagedSpotTraining"] is True
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    checkpoints = {
        "S3Uri": "s3://captions/image-captioning/flickr/checkpoints",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert job["CheckpointConfig"] == checkpoints
    assert job["ResourceConfig"] == {
        "InstanceType": "ml.g5.2xlarge", "InstanceCount": 2, "VolumeSizeInGB": 100, "VolumeKmsKeyId": KEY,
    }  # fmt: skip
    assert job["OutputDataConfig"]["KmsKeyId"] == KEY
    assert job["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert job["Tags"] == [{"Key": "team", "Value": "vision"}, {"Key": "cost", "Value": "low"}]
    assert job["Environment"] == {"HF_HUB_OFFLINE": "1"}
    assert "pytorch-training:2.8.0-gpu-py312" in job["AlgorithmSpecification"]["TrainingImage"]


def test_the_requests_fit_botocores_model_of_the_service(jobs):
    for job in jobs.values():
        validate({"CreateTrainingJob": job})
        assert all(len(word) <= 256 for word in job["AlgorithmSpecification"]["ContainerEntrypoint"])


def test_the_code_that_is_uploaded_is_the_bundle_and_nothing_else(moto, jobs):
    code = next(c for c in jobs["v3"]["InputDataConfig"] if c["ChannelName"] == "code")
    prefix = code["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://captions/")
    listing = send(f"{moto}/captions?list-type=2&max-keys=1000&prefix={prefix}", "GET").decode()
    files = {key.removeprefix(prefix).lstrip("/") for key in re.findall("<Key>([^<]+)", listing)}
    assert {"train.py", "recipe.yaml", "requirements.txt", "sagemaker/train_entry.py", "data/sources.py"} <= files
    assert not [name for name in files if name.startswith((".", "tests", "benchmarks", "runs", "docs"))]
    assert {name.rsplit(".", 1)[-1] for name in files} <= {"py", "txt", "yaml", "json", "LICENSE", "jinja", "css", "js"}


@pytest.mark.parametrize("env", ["v2", "v3"])
def test_a_dry_run_prints_the_request_and_sends_nothing(env, moto):
    words = [word for word in LAUNCH if word != "--no_wait"]
    result = run(env, "launch.py", *words, "--dry_run", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert re.search(r"source bundle: \d+ files, \d+ KiB", text)
    request = json.loads(text[text.index("CreateTrainingJob {") + len("CreateTrainingJob ") :])
    assert request["EnableManagedSpotTraining"] is True
    validate({"CreateTrainingJob": request})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "none.yaml"], "none.yaml: there is no such file"),
        (["--max_wait", "5"], "at least --max_run"),
        (["recipes/blip/flickr8k.yaml"], "passed as --recipe"),
        (["--train", "nowhere"], "neither an s3:// URI nor a local path"),
        (["--subnets", "subnet-1"], "go together"),
        (["--dataset_name", "s3://a/b", "--train", "s3://a/c"], "exclude each other"),
    ],
)
def test_a_mistake_is_one_sentence(words, said):
    result = run("v3", "launch.py", "--role", ROLE, "--bucket", "captions", *words)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


MISTAKES = {
    "--learning_rat 1e-5": "unrecognized argument: --learning_rat. Did you mean --learning_rate?",
    "--instance_typ ml.g5.xlarge": "unrecognized argument: --instance_typ. Did you mean --instance_type?",
    "--recipe RECIPE": "unrecognized argument: --num_train_epoch. Did you mean --num_train_epochs?",
    "--instances captions.csv": "--instances captions.csv is not sent to the job",
    "--run_name a_b": "--run_name a_b: AWS takes up to 63 letters, digits and hyphens",
    "--max_run 0": "--max_run 0: it must be at least 1",
    "recipes/blip/flickr8k.yaml": "A recipe is passed as --recipe",
    "--no_spot --learning-rate 1e-5 --no_fast_attention": "The SageMaker SDK is not installed",
    "--recipe FLICKR8K --no-spot": "The SageMaker SDK is not installed",
}
WITHOUT_TRANSFORMERS = """
import contextlib, io, json, os, sys
for name in ("transformers", "torch", "datasets", "numpy", "PIL"):
    sys.modules[name] = None
sys.path.insert(0, "sagemaker")
import aws, launch
os.chdir(sys.argv[1])
print(json.dumps(list(launch.files_of_channel("data", "captions.csv", {}).values())))
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit):
        sys.argv = ["launch.py", "--role", "r", "--bucket", "b", *words]
        aws.run(launch.main)
    print(json.dumps(said.getvalue()))
"""


def test_a_mistake_in_flags_is_found_before_a_machine_is_paid_for(tmp_path, monkeypatch, capsys):
    """With transformers, in this process, and without it."""
    (tmp_path / "my.yaml").write_text("num_train_epoch: 3\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    (tmp_path / "captions.csv").write_text("image,caption\nphotos/a.jpg,a\n")
    flickr8k = str(ROOT / "recipes/blip/flickr8k.yaml")
    commands = [text.replace("RECIPE", "my.yaml").replace("FLICKR8K", flickr8k).split() for text in MISTAKES]
    monkeypatch.chdir(tmp_path)
    said = []
    for words in [*commands, ["--learning_rate", "abc"]]:
        monkeypatch.setattr("sys.argv", ["launch.py", "--role", "r", "--bucket", "b", *words])
        with pytest.raises(SystemExit) as stop:
            launch_aws.run(launch.main)
        assert stop.value.code == 2
        said.append(capsys.readouterr().err)
    assert "invalid float value: 'abc'" in said.pop()
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, tmp_path, json.dumps(commands)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == '["", "photos"]'
    without = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('"')]
    for messages in (said, without):
        for (words, expected), message in zip(MISTAKES.items(), messages, strict=True):
            assert expected in message, (words, message)
            assert "Traceback" not in message


def test_the_flags_that_are_checked_without_transformers_are_those_of_the_jobs_version():
    pin = re.search(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    if version("transformers") != pin:
        pytest.skip(f"transformers {version('transformers')} is installed, not {pin}, which a job has")
    names = {field.name for field in dataclasses.fields(trainer_flags()) if field.init}
    assert set(launch.TRAINER_FLAGS.read_text(encoding="utf-8").split()) == names


@pytest.mark.parametrize("quoted", [False, True], ids=["v3", "v2"])
def test_a_job_gets_every_value_as_it_was_typed(quoted, tmp_path):
    words = ["--prompt", "", "--augment_text=", "--question", "[DEC] a", "--answer", '"a"', "--other", "null", "--lr", "-1",
             "--augment", "flip", "randaugment:2:5", "--gradient_checkpointing", "--no_fast_attention",
             "--model_name_or_path", "s3://m/a"]  # fmt: skip
    args = Namespace(recipe=None, train=None, validation=None, test=None)
    values, channels = launch.job_of_flags(args, launch.flags_of_words(words), {})
    assert channels == {"model": "s3://m/a"}
    if quoted:  # as SDK v2 does
        values = {name: json.dumps(value) for name, value in values.items()}
    (tmp_path / "hyperparameters.json").write_text(json.dumps(values))
    flags, _ = train_entry.read_hyperparameters(tmp_path / "hyperparameters.json")
    assert {name: train_entry.as_words(value) for name, value in flags.items()} == {
        "prompt": [""], "augment_text": [""], "question": ["[DEC] a"], "answer": ['"a"'], "other": ["null"], "lr": ["-1"],
        "augment": ["flip", "randaugment:2:5"], "gradient_checkpointing": ["true"], "fast_attention": ["false"],
    }  # fmt: skip


def test_a_table_is_uploaded_with_the_pictures_that_it_names(tmp_path):
    class Recorder:
        def upload_data(self, path, bucket, key_prefix, extra_args):
            sent[f"{key_prefix}/{Path(path).name}"] = Path(path)

    places = ("photos/a.jpg", "b.JPG", "photos/deep/c.png")
    for place in (*places, "photos/other.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(b"")
    tables = {
        "t.csv": "image,caption,url\nphotos/a.jpg,a dog,https://x.org/1.jpg\nb.JPG,b,\nc.png,c,\n",
        "t.jsonl": "\n".join(
            json.dumps({"image": name, "captions": ["a"]}) for name in ("photos\\a.jpg", "b.JPG", "c.png")
        ),
        "t.json": json.dumps({"images": [{"file_name": place, "coco_url": "http://x.org/a.jpg"} for place in places]}),
    }
    args = Namespace(prefix="p", run_name="r", bucket="b", kms_key=None)
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
        sent: dict = {}
        launch.files_below.cache_clear()
        files = launch.files_of_channel("data", str(tmp_path / name), {})
        assert launch.upload(Recorder(), args, "data", str(tmp_path / name), files) == "s3://b/p/r/input/data"
        assert set(sent) == {f"p/r/input/data/{place}" for place in (*places, name)}
    assert list(launch.files_of_channel("data", str(tmp_path / "t.csv"), {"images": "s3://i"})) == [tmp_path / "t.csv"]
    (tmp_path / "b.JPG").unlink()
    with pytest.raises(
        ValueError, match=r"names 1 pictures that are not in its folder or below, the first: b\.JPG\. Name"
    ):
        launch.files_of_channel("data", str(tmp_path / "t.csv"), {})
    with pytest.raises(ValueError, match="neither an s3:// URI nor a local path"):
        launch.files_of_channel("train", "nowhere", {})


RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "accelerate"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_launch_takes_every_recipe_that_train_py_takes(recipe, monkeypatch, capsys):
    """In the environment of train.py, where the recipe is looked at: what is missing then is the SDK alone."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["launch.py", "--role", "r", "--bucket", "b", "--recipe", str(recipe), "--dry_run"])
    with pytest.raises(SystemExit):
        launch_aws.run(launch.main)
    assert "The SageMaker SDK is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["launch", "deploy", "train_entry"])
def test_help_needs_no_sdk_and_starts_nothing(script):
    command = [sys.executable, ROOT / f"sagemaker/{script}.py", "--help"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SAGEMAKER_BASE_DIR": "/nowhere"}
    )
    assert result.returncode == 0, result.stderr
    assert "SageMaker" in result.stdout


# ---------------------------------------------------------------- deploy.py

DEPLOY = {
    "realtime": ["--max_capacity", "3", "--environment", "CAPTION_MAX_IMAGES=4"],
    "serverless": ["--mode", "serverless", "--memory", "4096"],
    "async": ["--mode", "async", "--max_capacity", "2", "--min_capacity", "0"],
    "batch": ["--mode", "batch", "--input", "s3://photos/new/"],
}


def deploy(moto, env, mode):
    words = [*ACCOUNT, *DEPLOY[mode], "--model_data", "s3://captions/model.tar.gz", "--name", f"{mode}-{env}"]
    words += [] if mode == "serverless" else ["--instance_type", "ml.g4dn.xlarge"]  # moto does not know the default
    calls, result = requests_of(moto, env, "deploy.py", *words, "--no_wait")
    return json.loads(json.dumps(calls).replace(f"{mode}-{env}", "NAME")), result


@pytest.fixture(scope="module")
def deployed(moto):
    return {mode: {env: deploy(moto, env, mode) for env in ("v2", "v3")} for mode in DEPLOY}


@pytest.mark.parametrize("mode", DEPLOY)
def test_both_sdks_make_the_same_requests_and_they_fit_the_service(mode, deployed):
    (two, _), (three, _) = deployed[mode]["v2"], deployed[mode]["v3"]
    assert two == three
    validate(two)
    expected = {
        "realtime": {"CreateModel", "CreateEndpointConfig", "CreateEndpoint", "RegisterScalableTarget", "PutScalingPolicy"},
        "serverless": {"CreateModel", "CreateEndpointConfig", "CreateEndpoint"},
        "async": {"CreateModel", "CreateEndpointConfig", "CreateEndpoint", "RegisterScalableTarget", "PutScalingPolicy"},
        "batch": {"CreateModel", "CreateTransformJob"},
    }  # fmt: skip
    assert two.keys() == expected[mode]


def test_the_model_and_the_endpoint_are_what_was_asked_for(deployed):
    calls, result = deployed["realtime"]["v3"]
    container = calls["CreateModel"]["PrimaryContainer"]
    assert container["Image"].endswith(
        "huggingface-pytorch-inference:2.6.0-transformers5.5.3-gpu-py312-cu124-ubuntu22.04"
    )
    assert container["ModelDataUrl"] == "s3://captions/model.tar.gz"
    assert container["Environment"]["CAPTION_MAX_IMAGES"] == "4"
    assert container["Environment"]["SAGEMAKER_MAX_PAYLOAD_IN_MB"] == "28"
    assert calls["CreateModel"]["VpcConfig"]["Subnets"] == ["subnet-1", "subnet-2"]
    (variant,) = calls["CreateEndpointConfig"]["ProductionVariants"]
    assert variant["InstanceType"] == "ml.g4dn.xlarge"
    assert calls["CreateEndpointConfig"]["KmsKeyId"] == KEY
    assert "curl --aws-sigv4" in result.stdout
    serverless = deployed["serverless"]["v3"][0]
    (variant,) = serverless["CreateEndpointConfig"]["ProductionVariants"]
    assert variant["ServerlessConfig"] == {"MemorySizeInMB": 4096, "MaxConcurrency": 5}
    assert "-cpu-" in serverless["CreateModel"]["PrimaryContainer"]["Image"]
    asynchronous = deployed["async"]["v3"][0]
    assert asynchronous["RegisterScalableTarget"]["MinCapacity"] == 0
    assert "AsyncInferenceConfig" in asynchronous["CreateEndpointConfig"]
    job = deployed["batch"]["v3"][0]["CreateTransformJob"]
    assert job["TransformInput"]["DataSource"]["S3DataSource"]["S3Uri"] == "s3://photos/new/"


def test_the_image_is_the_one_that_sdk_v3_knows(deployed):
    script = (
        "from sagemaker.core import image_uris; print(image_uris.retrieve('huggingface', 'us-east-1', version='5.5.3', "
        "base_framework_version='pytorch2.6.0', py_version='py312', instance_type='{}', image_scope='inference'))"
    )
    for mode, machine in (("realtime", "ml.g5.xlarge"), ("serverless", "ml.m5.xlarge")):
        command = [program("v3"), "-c", script.format(machine)]
        known = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        assert known == deployed[mode]["v2"][0]["CreateModel"]["PrimaryContainer"]["Image"]


def test_delete_removes_the_endpoint_its_configuration_and_its_model(moto, deployed):
    words = ["--role", ROLE, "--bucket", "captions", "--delete", "realtime-v3"]
    calls, result = requests_of(moto, "v3", "deploy.py", *words)
    assert calls.keys() == {"DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel"}
    assert result.stdout.count("deleted") == 4
    again = run("v3", "deploy.py", *words, address=moto)
    assert again.returncode == 0
    assert "deleted endpoint" not in again.stdout


def test_a_local_model_is_packed_and_uploaded(moto, tmp_path):
    folder = tiny.build_folder(tmp_path)
    calls, _ = requests_of(
        moto,
        "v3",
        "deploy.py",
        "--role",
        ROLE,
        "--bucket",
        "captions",
        "--model",
        folder,
        "--name",
        "local",
        "--no_wait",
        "--instance_type",
        "ml.m5.xlarge",
    )
    assert calls["CreateModel"]["PrimaryContainer"]["ModelDataUrl"] == (
        "s3://captions/image-captioning/local/model.tar.gz"
    )
    content = send(f"{moto}/captions/image-captioning/local/model.tar.gz", "GET")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        names = tar.getnames()
    assert {"model.safetensors", "config.json", "code/inference.py", "code/requirements.txt"} <= set(names)


def test_a_dry_run_of_deploy_prints_every_request_and_sends_nothing():
    words = [*ACCOUNT, *DEPLOY["async"], "--model_data", "s3://captions/model.tar.gz", "--name", "dry", "--dry_run"]
    result = run("v2", "deploy.py", *words, address="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    for name in ("CreateModel", "CreateEndpointConfig", "CreateEndpoint", "RegisterScalableTarget", "PutMetricAlarm"):
        assert f"{name} " in result.stdout
    assert result.stdout.count("PutScalingPolicy ") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Give one of --model"),
        (["--model", "nowhere"], "lacks config.json"),
        (["--model", "x", "--mode", "batch"], "--mode batch and --input"),
        (["--model", "x", "--mode", "serverless", "--instance_type", "ml.g5.xlarge"], "not --instance_type"),
        (["--model", "x", "--max_capacity", "2", "--min_capacity", "0"], "--min_capacity must be"),
    ],
)
def test_a_mistake_in_deploying_is_one_sentence(words, said, moto):
    result = run("v3", "deploy.py", "--role", ROLE, "--bucket", "captions", *words, address=moto)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
