"""Put a trained captioner behind a SageMaker endpoint, or caption an S3 folder with it.

python sagemaker/deploy.py --role ARN --bucket NAME --model runs/blip-flickr8k          (or --model_data s3://...tar.gz)
python sagemaker/deploy.py --role ARN --bucket NAME --model DIR --mode serverless | async | batch --input s3://images/
python sagemaker/deploy.py --role ARN --bucket NAME --delete NAME

Needs `pip install -r sagemaker/requirements.txt`; SDK v3 and v2 make the same requests. A model.tar.gz from a
launch.py job contains the code that serves it; a local folder is packed and uploaded.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import aws
import bundle
from aws import image_uris

# AWS' Hugging Face image with transformers 5. SDK v2 only knows its predecessor, in the same place.
IMAGE, KNOWN_IMAGE = "transformers5.5.3", "4.51.3"


def main():
    args = read_flags()
    session = aws.open_session(args)
    client = session.sagemaker_client
    if args.delete:
        delete(session.boto_session, args.delete)
        return
    args.model_data = args.model_data or upload(session, args)
    image = args.image_uri or image_uri(session.boto_region_name, args.instance_type)
    client.create_model(**model_request(args, image))
    if args.mode == "batch":
        client.create_transform_job(**transform_request(args))
        print(f"transform job {args.name}: captions in {args.output}, one file per image, named after it with .out")
        if not (args.no_wait or args.dry_run):
            client.get_waiter("transform_job_completed_or_stopped").wait(TransformJobName=args.name)
        return
    client.create_endpoint_config(**endpoint_config_request(args))
    client.create_endpoint(EndpointName=args.name, EndpointConfigName=args.name, Tags=aws.tags_of(args))
    if not (args.no_wait or args.dry_run):
        print(f"waiting for endpoint {args.name}: some five to ten minutes", flush=True)
        client.get_waiter("endpoint_in_service").wait(EndpointName=args.name)
    if args.max_capacity:
        scale(session.boto_session, args)
    print(how_to_call(args, session.boto_region_name))


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    aws.account_flags(parser)
    add = parser.add_argument
    add("--model", help="Local model folder: a run of train.py, or what export.py made.")
    add("--model_data", help="The model.tar.gz of a training job, s3://...")
    add("--mode", choices=("realtime", "serverless", "async", "batch"), default="realtime", help="How it is served.")
    add("--name", default=time.strftime("caption-%Y%m%d-%H%M%S"), help="Name of model, endpoint and job.")
    add("--instance_type", help="Machine. Default: ml.g5.xlarge; serverless has CPUs only.")
    add("--instance_count", type=int, default=1, help="Machines.")
    add("--workers", type=int, default=1, help="Processes per machine, each with its own copy of the model.")
    add("--environment", nargs="+", default=[], type=aws.pair, metavar="KEY=VALUE",
        help="Limits of inference.py, such as CAPTION_MAX_IMAGES=4.")  # fmt: skip
    add("--memory", type=int, default=6144, help="serverless: MB of memory.")
    add("--max_concurrency", type=int, default=5, help="serverless: concurrent requests; async: per machine.")
    add("--input", help="batch: S3 folder of images, or of .jsonl files.")
    add("--output", help="async, batch: S3 folder of the answers. Default: in the bucket.")
    add("--min_capacity", type=int, default=1, help="Autoscaling: fewest machines; 0 only with async.")
    add("--max_capacity", type=int, help="Autoscaling: most machines. Default: no autoscaling.")
    add("--target", type=float, help="Autoscaling: requests per minute and machine, default 60; async: waiting, 5.")
    add("--no_wait", action="store_true", help="Return before the endpoint or job is done.")
    add("--delete", metavar="NAME", help="Delete the endpoint, its configuration and its model, and stop paying.")
    args = parser.parse_args(aws.with_underscores(sys.argv[1:]))
    aws.check_account(args, "name")
    if not args.delete and bool(args.model) == bool(args.model_data):
        raise ValueError("Give one of --model, a local folder, and --model_data, s3://...")
    if (args.mode == "batch") != bool(args.input):
        raise ValueError("--mode batch and --input s3://... go together.")
    for name in ("model_data", "input", "output"):
        if not (getattr(args, name) or "s3://").startswith("s3://"):
            raise ValueError(f"--{name} {getattr(args, name)}: it must begin with s3://.")
    if args.max_capacity and args.mode in ("serverless", "batch"):
        raise ValueError(f"--max_capacity: {args.mode} scales by itself.")
    if args.max_capacity and not (args.mode != "async") <= args.min_capacity <= args.max_capacity:
        raise ValueError("--min_capacity must be from 1 (async: 0) to --max_capacity.")
    if args.mode == "serverless" and args.instance_type:
        raise ValueError("--mode serverless takes --memory and --max_concurrency, not --instance_type.")
    args.instance_type = args.instance_type or ("ml.m5.xlarge" if args.mode == "serverless" else "ml.g5.xlarge")
    args.output = args.output or f"s3://{args.bucket}/{args.prefix}/{args.name}/answers"
    return args


def upload(session, args) -> str:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "model.tar.gz")
        bundle.pack_model(Path(args.model), archive)
        key = f"{args.prefix}/{args.name}"
        print(f"model.tar.gz: {archive.stat().st_size / 2**20:.0f} MiB, to s3://{args.bucket}/{key}/", flush=True)
        extra = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": args.kms_key} if args.kms_key else None
        session.upload_data(str(archive), bucket=args.bucket, key_prefix=key, extra_args=extra)
    return f"s3://{args.bucket}/{key}/model.tar.gz"


def image_uri(region: str, instance_type: str) -> str:
    uri = image_uris.retrieve(
        "huggingface", region, version=KNOWN_IMAGE, base_framework_version="pytorch2.6.0", py_version="py312",
        instance_type=instance_type, image_scope="inference",
    )  # fmt: skip
    return uri.replace(f"transformers{KNOWN_IMAGE}", IMAGE)


def model_request(args, image: str) -> dict:
    environment = {
        "SAGEMAKER_MODEL_SERVER_WORKERS": str(args.workers),
        "SAGEMAKER_PROGRAM": "inference.py",
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "28",  # an image of CAPTION_MAX_BYTES as base64; the server's own limit is 6.25
    }
    vpc = {"Subnets": args.subnets, "SecurityGroupIds": args.security_group_ids}
    return {
        "ModelName": args.name,
        "ExecutionRoleArn": args.role,
        "PrimaryContainer": {
            "Image": image,
            "ModelDataUrl": args.model_data,
            "Environment": environment | dict(args.environment),
        },
        "Tags": aws.tags_of(args),
        **({"VpcConfig": vpc} if args.subnets else {}),
    }


def endpoint_config_request(args) -> dict:
    variant = {"VariantName": "captioner", "ModelName": args.name}
    kms = {"KmsKeyId": args.kms_key} if args.kms_key else {}
    request = {"EndpointConfigName": args.name, "ProductionVariants": [variant], "Tags": aws.tags_of(args)}
    if args.mode == "serverless":
        variant["ServerlessConfig"] = {"MemorySizeInMB": args.memory, "MaxConcurrency": args.max_concurrency}
        return request
    variant |= {"InstanceType": args.instance_type, "InitialInstanceCount": args.instance_count}
    if args.mode == "async":
        request["AsyncInferenceConfig"] = {
            "OutputConfig": {"S3OutputPath": args.output, **kms},
            "ClientConfig": {"MaxConcurrentInvocationsPerInstance": args.max_concurrency},
        }
    return request | kms


def transform_request(args) -> dict:
    lines = args.input.endswith((".jsonl", ".jsonlines"))
    kms = {"KmsKeyId": args.kms_key} if args.kms_key else {}
    return {
        "TransformJobName": args.name,
        "ModelName": args.name,
        "BatchStrategy": "SingleRecord",
        "MaxPayloadInMB": 20,
        "TransformInput": {
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": args.input}},
            "ContentType": "application/jsonlines" if lines else "application/x-image",
            "SplitType": "Line" if lines else "None",
        },
        "TransformOutput": {
            "S3OutputPath": args.output,
            "Accept": "application/jsonlines" if lines else "application/json",
            "AssembleWith": "Line" if lines else "None",
            **kms,
        },
        "TransformResources": {
            "InstanceType": args.instance_type,
            "InstanceCount": args.instance_count,
            **({"VolumeKmsKeyId": args.kms_key} if args.kms_key else {}),
        },
        "Tags": aws.tags_of(args),
    }


def scale(aws_session, args) -> None:
    """Target tracking: by requests per minute, or for an asynchronous endpoint by waiting requests. Without machines
    there is no such metric: an alarm starts the first one."""
    client = aws_session.client("application-autoscaling")
    endpoint = [{"Name": "EndpointName", "Value": args.name}]
    target = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{args.name}/variant/captioner",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }
    client.register_scalable_target(**target, MinCapacity=args.min_capacity, MaxCapacity=args.max_capacity)
    if args.mode == "async":
        metric = {
            "CustomizedMetricSpecification": {
                "MetricName": "ApproximateBacklogSizePerInstance",
                "Namespace": "AWS/SageMaker",
                "Dimensions": endpoint,
                "Statistic": "Average",
            }
        }
    else:
        metric = {"PredefinedMetricSpecification": {"PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"}}
    client.put_scaling_policy(
        **target,
        PolicyName=f"{args.name}-tracking",
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": args.target or (5 if args.mode == "async" else 60),
            **metric,
        },
    )
    if args.min_capacity:
        return
    policy = client.put_scaling_policy(
        **target,
        PolicyName=f"{args.name}-wake",
        PolicyType="StepScaling",
        StepScalingPolicyConfiguration={
            "AdjustmentType": "ChangeInCapacity",
            "Cooldown": 300,
            "StepAdjustments": [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}],
        },
    )
    aws_session.client("cloudwatch").put_metric_alarm(
        AlarmName=f"{args.name}-wake",
        AlarmActions=[policy.get("PolicyARN", "the policy's ARN")],
        Namespace="AWS/SageMaker",
        MetricName="HasBacklogWithoutCapacity",
        Dimensions=endpoint,
        Statistic="Average",
        Period=60,
        EvaluationPeriods=2,
        Threshold=1,
        ComparisonOperator="GreaterThanOrEqualToThreshold",
    )


def delete(aws_session, name: str) -> None:
    """The endpoint first: it is what costs money. What does not exist, or not any more, is skipped."""
    client = aws_session.client("sagemaker")
    for resource, remove in (
        ("endpoint", lambda: client.delete_endpoint(EndpointName=name)),
        ("endpoint configuration", lambda: client.delete_endpoint_config(EndpointConfigName=name)),
        ("model", lambda: client.delete_model(ModelName=name)),
        (
            "alarm, if there was one,",
            lambda: aws_session.client("cloudwatch").delete_alarms(AlarmNames=[f"{name}-wake"]),
        ),
    ):
        try:
            remove()
            print(f"deleted {resource} {name}")
        except client.exceptions.ClientError as error:
            print(f"{resource} {name}: {error.response['Error']['Message']}")


def how_to_call(args, region: str) -> str:
    if args.mode == "async":
        return (
            f"endpoint {args.name}\n"
            f"  aws sagemaker-runtime invoke-endpoint-async --endpoint-name {args.name} --content-type image/jpeg "
            f"--input-location s3://{args.bucket}/photo.jpg --region {region}\n"
        )
    return f"""endpoint {args.name}

curl (8 or newer signs the request itself):
  curl --aws-sigv4 aws:amz:{region}:sagemaker --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY" \\
    -H "x-amz-security-token: $AWS_SESSION_TOKEN" -H "Content-Type: image/jpeg" --data-binary @photo.jpg \\
    https://runtime.sagemaker.{region}.amazonaws.com/endpoints/{args.name}/invocations

Python:
  import boto3, json
  answer = boto3.client("sagemaker-runtime", region_name="{region}").invoke_endpoint(
      EndpointName="{args.name}", ContentType="image/jpeg", Body=open("photo.jpg", "rb").read())
  print(json.load(answer["Body"])["captions"][0])

delete: python sagemaker/deploy.py --role {args.role} --bucket {args.bucket} --delete {args.name}
"""


if __name__ == "__main__":
    aws.run(main)
