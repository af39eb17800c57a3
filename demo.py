"""The captioner in a browser.

    python demo.py --model_name_or_path runs/quickstart                         then open http://127.0.0.1:7860
    python demo.py --model_name_or_path runs/a --compare_to runs/b              two models, side by side
    python demo.py --model_name_or_path openai:gpt-4o-mini                      a model on a server, as for infer.py
    python demo.py --model_name_or_path runs/a --host 0.0.0.0 --login users.txt on your network, with a login
    python demo.py --model_name_or_path runs/a --root_path /captions            behind a proxy that serves it there

The same from Python, by `gradio_client`; every setting is an argument with the page's own default:

    client = Client("http://127.0.0.1:7860")
    caption, others, html = client.predict(image=handle_file("photo.jpg"), num_beams=3, api_name="/caption")
    status, table, files = client.predict(files=[handle_file("photos.zip")], api_name="/caption_files")

Nothing is sent anywhere but to a model's own server: no telemetry, no fonts or scripts from elsewhere, and no URL is fetched for
a visitor.
"""

from arguments import DEMO_GROUPS
from common.cli import check, parse, run

if __name__ == "__main__":
    check(DEMO_GROUPS)  # answers --help and mistakes before torch is imported

import base64
import dataclasses
import logging
import os
import tempfile
import time
from pathlib import Path

from captioner import Captioner
from captioning import server
from common.errors import UserError
from drawn_scenes import drawing as scenes
from reports.report import read_thumbnails

try:
    import gradio as gr
except ImportError:
    gr = None
else:
    from starlette.middleware import Middleware

    from demo_page import CSS, NAMES, RelativeLinks, build, theme

logger = logging.getLogger("demo")


def main():
    model_args, generation_args, args, server_args = parse(DEMO_GROUPS)
    if gr is None:
        raise UserError("The demo is built with Gradio, which is not installed: pip install gradio")
    login = args.users()
    if args.host not in ("127.0.0.1", "localhost", "::1") and not login:
        logger.warning("everybody who can reach %s can use this demo; --login FILE asks for a password", args.host)
    names = [model_args.model_name_or_path, *filter(None, [args.compare_to])]
    if len(set(map(server.is_served, names))) == 1:  # of a model here and one on a server, each has its flags
        server.check_flags(model_args, generation_args, server_args, args)
    loaded = [load_captioner(name, model_args, generation_args, args, server_args) for name in names]
    captioners = dict(zip(shown_names(names), loaded, strict=True))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory() as folder:
        examples = sorted(map(str, Path(args.examples).iterdir()))[:8] if args.examples else []
        examples = examples or pictures_of_run(model_args.model_name_or_path, folder) or draw_examples(folder)
        app = build(captioners, examples, args.max_images)
        logger.info("open http://%s:%d; Control-C stops it", args.host, args.port)
        app.queue(max_size=args.max_queue, default_concurrency_limit=1)
        try:
            app.launch(
                server_name=args.host,
                server_port=args.port,
                root_path=args.root_path,
                app_kwargs={"middleware": [Middleware(RelativeLinks)]},
                auth=login,
                max_file_size=args.max_upload_mb * 1_000_000,
                share=False,
                ssr_mode=False,
                quiet=True,
                footer_links=["api"],
                css=CSS,
                js=NAMES,
                theme=theme(),
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: {error}") from None
        wait(app)


def wait(app) -> None:
    """Until Ctrl-C, at which Gradio's own waiting ends with 0."""
    try:
        while True:
            time.sleep(1)
    finally:
        app.close(verbose=False)  # else threads that wait for a visitor may keep the process


def load_captioner(name: str, model_args, generation_args, args, server_args) -> Captioner | server.ServerCaptioner:
    if server.is_served(name):
        model_args = dataclasses.replace(model_args, model_name_or_path=name)
        return server.connect(model_args, generation_args, server_args, seed=None)
    loading = {"bf16": args.bf16, "fast_jpeg": model_args.fast_jpeg, "loading": model_args.loading()}
    return Captioner.from_pretrained(name, **loading, **generation_args.settings())


def shown_names(models: list[str]) -> list[str]:
    """What visitors see: a Hub id, or a folder's name; never a path of the server."""
    names = [Path(model).resolve().name if Path(model).exists() else model for model in models]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def pictures_of_run(model: str, folder: str) -> list[str]:
    """Pictures of the split that the model was scored on, as its report.html has them; none if there is no such report."""
    pictures = list(read_thumbnails(model).values())[:4]
    paths = [Path(folder, f"{number}.webp") for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(base64.b64decode(picture))
    if paths:
        logger.info("the examples are pictures of %s/report.html; --examples names a folder of others", model)
    return list(map(str, paths))


def draw_examples(folder: str) -> list[str]:
    """Three of the quickstart's scenes, as files."""
    paths = []
    for row in scenes.load(train=0, validation=0, test=3)["test"]:
        paths.append(f"{folder}/{row['image_id']}.png")
        Path(paths[-1]).write_bytes(row["image"]["bytes"])
    return paths


if __name__ == "__main__":
    run(main, when_stopped="")
