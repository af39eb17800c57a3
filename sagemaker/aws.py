"""What launch.py and deploy.py share: the installed SDK, sessions, flags of the account, and dry runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys

try:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.awsrequest import AWSResponse
    from botocore.exceptions import BotoCoreError, ClientError

    try:  # SDK v3
        from sagemaker.core import image_uris
        from sagemaker.core.helper.session_helper import Session

        SDK = 3
    except ImportError:
        from sagemaker import Session
        from sagemaker import image_uris as image_uris  # launch.py and deploy.py take it from here

        SDK = 2
except ImportError:  # --help and mistakes are answered without it; open_session says what is missing
    SDK = image_uris = None
    Boto3Error = BotoCoreError = ClientError = OSError


def account_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", required=True, help="ARN of the role that SageMaker assumes (README, Permissions).")
    parser.add_argument("--bucket", required=True, help="S3 bucket for code, checkpoints and models.")
    parser.add_argument("--prefix", default="image-captioning", help="Folder in the bucket for all of it.")
    parser.add_argument("--region", help="AWS region. Default: the configured one.")
    parser.add_argument("--subnets", nargs="+", default=[], help="Run inside a VPC: its subnets ...")
    parser.add_argument("--security_group_ids", nargs="+", default=[], help="... and security groups.")
    parser.add_argument("--kms_key", help="KMS key for the machines' disks and for what is written to S3.")
    parser.add_argument("--tags", nargs="+", default=[], type=pair, metavar="KEY=VALUE", help="Tags of all resources.")
    parser.add_argument("--image_uri", help="Container image. Default: the AWS image that the README names.")
    parser.add_argument("--dry_run", action="store_true", help="Print the full requests and send none.")


def with_underscores(words: list[str]) -> list[str]:
    """The command line with --a-flag as --a_flag."""
    split = [word.partition("=") for word in words]
    return [name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else name + equals + value
            for name, equals, value in split]  # fmt: skip


def check_account(args, name: str) -> None:
    """ValueError for what AWS would refuse only after something was uploaded. `name`: the flag of what AWS is to name."""
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", getattr(args, name)):
        raise ValueError(f"--{name} {getattr(args, name)}: AWS takes up to 63 letters, digits and hyphens.")
    if bool(args.subnets) != bool(args.security_group_ids):
        raise ValueError("--subnets and --security_group_ids go together.")


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE.")
    return name, value


def tags_of(args) -> list[dict]:
    return [{"Key": name, "Value": value} for name, value in args.tags]


def open_session(args) -> Session:
    """The SDK's session. In a dry run it needs no account, and nothing leaves the machine."""
    if SDK is None:
        raise ValueError("The SageMaker SDK is not installed: pip install -r sagemaker/requirements.txt")
    if args.dry_run:
        os.environ["SAGEMAKER_VALIDATE_ROLE"] = "false"  # SDK v3 asks IAM about it
        region = args.region or boto3.Session().region_name or "us-east-1"
        session = boto3.Session(aws_access_key_id="dry", aws_secret_access_key="run", region_name=region)
        session.events.register("before-send", answer_nothing)
        for service in ("sagemaker", "application-autoscaling", "cloudwatch"):
            session.events.register(f"before-call.{service}", print_request)
    else:
        session = boto3.Session(region_name=args.region)
        if not session.region_name:
            raise ValueError("No AWS region is configured: pass --region.")
        if not session.get_credentials():
            raise ValueError("No AWS credentials are configured: run 'aws configure', or set AWS_PROFILE.")
    session = Session(session, default_bucket=args.bucket)
    session._default_bucket = args.bucket  # else the SDK lists all buckets, and creates one that it does not find
    return session


def print_request(model, params, **_):
    """Botocore's hook before a call; its answer replaces the service's."""
    body = params["body"]
    with contextlib.suppress(ValueError, TypeError):  # CloudWatch's is not JSON
        body = json.dumps(json.loads(body), indent=2)
    print(f"{model.name} {body}", flush=True)
    if model.name == "CreateTrainingJob":
        sys.exit(0)  # the last request; after it the SDK would report the use of its features to AWS
    return AWSResponse("", 200, {}, Body(b"")), {}


def answer_nothing(request, event_name, **_) -> AWSResponse:
    """Botocore's hook before sending, for the SDK's own requests to other services."""
    return AWSResponse(request.url, 200 if event_name.startswith("before-send.s3") else 403, {}, Body(b"<Empty/>"))


class Body:
    def __init__(self, content: bytes):
        self.content = content

    def stream(self, **_):
        yield self.content


def run(main) -> None:
    """Turns a user's mistake, or a refusal by AWS, into one message and exit code 2."""
    try:
        main()
    except (ValueError, OSError, Boto3Error, BotoCoreError, ClientError) as error:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
        sys.exit(2)
