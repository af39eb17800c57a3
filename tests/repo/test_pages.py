"""The pages' own commands and code: every block of README.md, docs/, sagemaker/README.md and the recipes' heads starts as
it is written, and README's chain of commands runs to its end in a copy of what is committed."""

import ast
import gc
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_run
import tiny
import yaml
from conftest import ROOT
from PIL import Image
from small_run import CAPTIONS

import arguments
from common import cli

sys.path.insert(0, str(ROOT / "sagemaker"))
import deploy
import launch

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "sagemaker/README.md",
]
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
GROUPS = {
    "train.py": (arguments.TRAIN_GROUPS, None),
    "evaluate.py": (arguments.EVALUATE_GROUPS, None),
    "infer.py": (arguments.INFER_GROUPS, "paths"),
    "rewrite.py": (arguments.REWRITE_GROUPS, "task"),
    "demo.py": (arguments.DEMO_GROUPS, None),
    "serve.py": (arguments.SERVE_GROUPS, None),
    "export.py": (arguments.EXPORT_GROUPS, "folder"),
}
# What a reader brings: pictures, captions, weights.
BROUGHT = [
    "photos/a.jpg",
    "captions.csv",
    "captions.json",
    "annotations.json",
    "photo.jpg",
    "PHOTO",
    "raw.jsonl",
    "captions.parquet",
    "capsfusion_1.parquet",
    "shards/0.tar",
    "clip_ViT-B-32.pth",
    "data/flickr8k/Flicker8k_Dataset/a.jpg",
    "data/vocab.txt",
    "data/coco/a.jpg",
    "path/to/flickr8k/a.jpg",
    "path/to/vizwiz/a.jpg",
    "path/to/coco/a.jpg",
    "path/to/vocab.txt",
    "path/to/clip_ViT-B-32.pth",
    "DIR/config.json",
    "captions.jsonl.shards/_flagged.txt",
]
OTHER_PROGRAMS = (
    "ray",
    "srun",
    "docker",
    "sbatch",
    "deepspeed",
    "source",
    "export",
    "alias",
    "git",
    "cd",
    "curl",
    "aws",
)


# The blocks that are no commands and no JSON: what runs them, or why nothing does.
OTHER_BLOCKS = {
    "README.md text": "the tree of files",
    "docs/add-your-own.md python": "tests/repo/test_add_your_own.py applies it",
    "docs/add-your-own.md text": "tests/repo/test_add_your_own.py applies it",
    "docs/operations.md python": "tests/scripts/test_serve.py asks with it",
    "docs/operations.md text": "what --status prints: tests/data/test_shards.py",
    "docs/reports.md nginx": "another program's; tests/helpers/proxy.py stands for it",
    "docs/reports.md python": "tests/metrics/test_coco_caption.py runs it",
    "docs/rewards.md python": "tests/objectives/test_rewards.py runs it",
    "docs/scale.md python": "the first starts in a test below; the second needs AWS",
    "docs/scale.md text": "the files of a run: tests/data/test_shards.py",
    "docs/scores.md python": "tests/metrics/test_scores_doc.py runs it",
    "sagemaker/README.md text": "a request: tests/sagemaker/test_sagemaker_inference.py sends such",
}


def all_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each; those of commands have none, or powershell."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def fenced(page: Path, language: str) -> list[str]:
    return [text for name, text in all_blocks(page) if name == language]


def commands(page: Path) -> list[str]:
    """The commands of a page's blocks and of its sentences, or of a recipe's head, on one line each."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        head = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
        lines = re.findall(
            r"(?:^|[:&] +|^ +)((?:python|torchrun|accelerate) .*)", head.replace("\\\n", " "), re.MULTILINE
        )
        lines = [re.sub(r"\s{2,}\(.*", "", line) for line in lines]
    else:
        blocks = [*fenced(page, ""), *(block.replace("\\", "/") for block in fenced(page, "powershell"))]
        lines = [line for block in blocks for line in re.sub(r"\\\n *", " ", block).splitlines()]
        inline = re.findall(r"`((?:python|torchrun|accelerate|make|pip|\.venv\\Scripts\\python) [^`]+)`", text)
        lines += [line.replace("\\", "/") for line in inline]
    parts = [part for line in lines for part in re.split(r" && | \|\| break; done", line.replace("$stage", "1_lora"))]
    return [part.strip() for part in parts if part.strip() and not part.startswith("#")]


def words_of(command: str) -> list[str]:
    """Its words, without comment, variables before it, and the program that only starts another."""
    words = shlex.split(re.sub(r"\$\([^)]*\)", "X", command).replace("...", ""), comments=True)
    while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("srun", "time", "nohup")):
        words.pop(0)
    if words[0] in ("python3", "py"):
        words[0] = "python"
    if words[:2] == ["bash", "-c"]:
        return words_of(words[2])
    if words[:3] == ["ray", "job", "submit"]:
        return words[words.index("--") + 1 :]
    return words


def start(words: list[str], monkeypatch) -> None:
    """Everything that the command's program does before its work begins. AssertionError where it stops."""
    program, rest = words[0].rsplit("/", 1)[-1], words[1:]
    if program == "torchrun" or words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser
        from torch.distributed.run import get_args_parser

        parser = get_args_parser() if program == "torchrun" else launch_command_parser()
        rest = rest[program == "accelerate" :]
        parsed = parser.parse_args(
            rest if any(word.endswith(".py") for word in rest) else [*rest, "train.py", "--help"]
        )
        assert not getattr(parsed, "config_file", None) or Path(parsed.config_file).is_file(), parsed.config_file
        return start(["python", parsed.training_script, *parsed.training_script_args], monkeypatch)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif program in ("launch", "deploy"):
        sagemaker(program, rest, monkeypatch)
    elif program == "python" and rest[:1] == ["-m"]:
        module(rest[1], rest[2:])
    elif program == "python":
        script(rest[0], rest[1:], monkeypatch)
    elif program == "pip" or rest[:2] == ["-m", "pip"]:
        for flag, value in itertools.pairwise(rest):
            assert flag not in ("-r", "-c") or (ROOT / value).is_file(), value
    else:
        assert program in OTHER_PROGRAMS, words


def script(name: str, words: list[str], monkeypatch) -> None:
    name = Path(name)
    assert (ROOT / name).is_file(), name
    if name.parent.name == "sagemaker":
        return sagemaker(name.stem, words, monkeypatch)
    if name.name not in GROUPS or name.parent.name:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.ImportFrom) and (ROOT / str(node.module).split(".")[0]).exists()
                       for node in tree.body), f"python -m is needed for {name}: it imports this repo"  # fmt: skip
        return None
    groups, positional = GROUPS[name.name]
    monkeypatch.setattr("sys.argv", [name.name, *words])
    try:
        cli.check(groups, positional=positional)
    finally:
        gc.enable()
    return None


def module(name: str, words: list[str]) -> None:
    if name in ("venv", "pip", "pytest"):
        return
    assert importlib.util.find_spec(name), name
    text = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    if "GROUPS" not in text:
        assert {flag for flag in flags if f'"{flag}"' not in text} == set(), name


def sagemaker(program: str, words: list[str], monkeypatch) -> None:
    if "--help" in words:
        return
    account = ["--role", "r", "--bucket", "b"]
    monkeypatch.setattr("sys.argv", [f"{program}.py", *account, *words])
    if program == "deploy":
        deploy.read_flags()
        return
    args, others = launch.read_flags()
    flags, recipe = launch.flags_of_words(others), launch.read_recipe(args.recipe)
    launch.check_train_flags(args, others, {**recipe, **flags})
    launch.job_of_flags(args, flags, recipe)


def cloned(folder: Path) -> Path:
    """What git has of this repo, as links."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in (
        listed if len(listed) > 1 else [p.relative_to(ROOT) for p in ROOT.glob("[!.]*/**/*") if "runs" not in p.parts]
    ):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the repo's files, what a reader brings, and what the commands of all pages leave."""
    folder = cloned(tmp_path_factory.mktemp("desk"))
    every = [command for page in [*PAGES, *RECIPES] for command in commands(page)]
    left = [
        *re.findall(r"--output(?:_dir)? (\S+)", "\n".join(every)),
        "runs/a",
        "runs/b",
        "runs/lora",
        "runs/scene_clip/reward",
    ]
    left += [str(yaml.safe_load(recipe.read_text(encoding="utf-8")).get("output_dir")) for recipe in RECIPES]
    for name in [*BROUGHT, *left]:
        path = folder / name
        if "://" not in name and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if Path(name).suffix and not name.startswith("runs") else path.mkdir()
    (folder / "my.yaml").write_text("num_train_epochs: 2\n")
    (folder / "photo.jpg").write_bytes((ROOT / "docs/overview.png").read_bytes())
    return folder


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_starts_as_it_is_written(page, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    for command in commands(page):
        placed = re.sub(r"(?<=[ =])/(?=(?:data|path/to)/)", f"{desk}/", command)
        code = 0
        try:
            start(words_of(placed), monkeypatch)
        except SystemExit as stop:
            code = stop.code
        except (ValueError, AssertionError) as error:
            raise AssertionError(f"{command}\n{error}") from error
        said = capsys.readouterr().err
        assert not code or "no run has written there" in said, f"{command}\n{said}"


def test_the_commands_of_the_readme_run_to_their_end_one_after_the_other(monkeypatch, tmp_path):
    """On a small model and 16 pictures; a server for the LLM, the Hub and AWS are not asked."""
    clone = cloned(tmp_path / "clone")
    monkeypatch.chdir(clone)
    tiny.write_photos(clone / "photos", CAPTIONS)
    lines = [f'photos/{name}.png,"{caption}"' for name, captions in CAPTIONS.items() for caption in captions]
    (clone / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    names = sorted(CAPTIONS)[:12]
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate(names)]
    annotations = [{"image_id": n, "id": n, "caption": CAPTIONS[name][0]} for n, name in enumerate(names)]
    (clone / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    Image.new("RGB", (40, 30), "red").save(clone / "photo.jpg")
    (clone / "captions.json").write_text(
        json.dumps([{"image_id": n, "caption": CAPTIONS[name][1]} for n, name in enumerate(names)])
    )
    quick = ["--meteor", "false", "--spice", "false", "--bootstrap_samples", "50"]
    more = {
        "train.py": ["--max_steps", "2", *small_run.flags(tmp_path, "captions.csv", "runs/mine")],
        "evaluate.py": quick, "rewrite.py": ["--dry_run"], "export.py": [],
    }  # fmt: skip
    ran = []
    for command in commands(ROOT / "README.md"):
        program, name, *words = [*words_of(command), ""]
        if program != "python" or name not in (*more, "infer.py") or "recipes" in words[0]:
            continue
        if "--compare" in words:
            for run in ("runs/a", "runs/b"):
                shutil.copytree(clone / "runs/mine", clone / run)
        added = ["--dry_run"] if "--push_to_hub" in words else more.get(name, [])
        tiny.run(clone / name, *filter(None, words), *(added if "--compare" not in words else []))
        ran.append(name)
    assert ran == ["train.py", *3 * ["evaluate.py"], "infer.py", "rewrite.py", "export.py", "export.py"]
    assert (clone / "runs/mine/report.html").exists()
    assert (clone / "runs/a-or-b/comparison.json").exists()


def test_every_other_block_is_run_by_a_test_or_has_a_reason():
    blocks = [
        (f"{page.relative_to(ROOT).as_posix()} {name}", name, text) for page in PAGES for name, text in all_blocks(page)
    ]
    others = [(kind, text) for kind, name, text in blocks if name not in ("", "powershell", "json")]
    assert {kind for kind, _ in others} == OTHER_BLOCKS.keys()
    for kind, text in others:
        assert not re.search(r"^ *(?:\S*/)?(?:python3?|pip|make|torchrun) \S", text, re.MULTILINE), (
            f"a command in {kind}"
        )
        for test in re.findall(r"tests/[\w/]+\.py", OTHER_BLOCKS[kind]):
            assert (ROOT / test).is_file(), test
        if OTHER_BLOCKS[kind].endswith(("applies it", "runs it", "asks with it")):
            assert kind.split()[0] in (ROOT / OTHER_BLOCKS[kind].split()[0]).read_text(encoding="utf-8"), kind


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_and_json_of_a_page_can_be_read(page):
    for block in fenced(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "sys.argv":
                name, *words = ast.literal_eval(node.value)
                cli.check(GROUPS[name][0], words, positional=GROUPS[name][1])
    for block in fenced(page, "json"):
        json.loads(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_script_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for linked, named in re.findall(
        r"\]\(([\w./-]+)\)|`((?:recipes|benchmarks|docs|data|models|metrics)/[\w./-]+)`", text
    ):
        assert "my" in named or (page.parent / linked if linked else ROOT / named).exists(), linked or named


def test_the_readme_fits_in_200_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_test_that_the_corrections_name_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/corrections.md").read_text())
    assert len(named) > 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


# Flags of docker, accelerate, torchrun, Slurm, Ray and SageMaker's launch.py in the pages, up to a hyphen.
OF_OTHER_PROGRAMS = (
    "help shm photos config_file num_processes num_machines machine_rank main_process_ip main_process_port nproc_per_node "
    "nnodes rdzv_id rdzv_backend rdzv_endpoint nodes ntasks gpus cpus requeue array head port address working generate "
    "environment signal signals"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_that_a_page_names_exists(page):
    known = {field for group in arguments.TRAIN_GROUPS for field in group.__dataclass_fields__}
    others = ("Sampling", "Evaluate", "Judge", "Infer", "ImageServer", "Demo", "Serve", "Rewrite", "LLM", "Export")
    for group in (getattr(arguments, f"{name}Arguments") for name in others):
        known |= set(group.__dataclass_fields__)
    for script in ("launch", "deploy", "aws"):
        known |= set(re.findall(r'"--(\w+)"', (ROOT / f"sagemaker/{script}.py").read_text(encoding="utf-8")))
    known |= set(launch.SPLITS)
    assert set(re.findall(r"--(\w+)", page.read_text(encoding="utf-8"))) - set(OF_OTHER_PROGRAMS.split()) <= known
