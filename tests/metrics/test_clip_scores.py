"""CLIP-S, PAC-S and PAC-S++ against an independent float64 computation, on small random CLIPs of each published layout."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from PIL import Image
from small_run import flags
from tiny_clip import EMBED, HEADS, LAYERS, LENGTH, PATCH, SIDE, WIDTH, words, write_clip
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from data.caption_files import find_images
from metrics.clip_scores import OPENAI_MEAN, OPENAI_STD, ClipScorer, clip_scores, load_clip, load_scorers, preprocess

CAPTIONS = ["a red circle", "two dogs near the water on the green grass", "a man"]
REFERENCES = [
    ["the red circle .", "a circle on grass"],
    ["dogs run near water"],
    ["a woman", "a child", "the man sits"],
]


def random_state(seed, lora=False):
    """A state dict with OpenAI's names, as its model and open_clip's have them."""
    torch.manual_seed(seed)

    def layer_weights(prefix):
        return {
            f"{prefix}ln_1.weight": (WIDTH,), f"{prefix}ln_1.bias": (WIDTH,),
            f"{prefix}ln_2.weight": (WIDTH,), f"{prefix}ln_2.bias": (WIDTH,),
            f"{prefix}attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{prefix}attn.in_proj_bias": (3 * WIDTH,),
            f"{prefix}attn.out_proj.weight": (WIDTH, WIDTH), f"{prefix}attn.out_proj.bias": (WIDTH,),
            f"{prefix}mlp.c_fc.weight": (4 * WIDTH, WIDTH), f"{prefix}mlp.c_fc.bias": (4 * WIDTH,),
            f"{prefix}mlp.c_proj.weight": (WIDTH, 4 * WIDTH), f"{prefix}mlp.c_proj.bias": (WIDTH,),
        }  # fmt: skip

    shapes = {
        "visual.class_embedding": (WIDTH,), "visual.proj": (WIDTH, EMBED), "text_projection": (WIDTH, EMBED),
        "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, WIDTH), "positional_embedding": (LENGTH, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH), "token_embedding.weight": (len(words()), WIDTH),
        "logit_scale": (),
    }  # fmt: skip
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    for tower in ("visual.", ""):
        for number in range(LAYERS):
            prefix = f"{tower}transformer.resblocks.{number}."
            shapes |= layer_weights(prefix)
            if lora:
                shapes |= {
                    f"{prefix}attn.in_proj_weight_lora_A": (4, WIDTH),
                    f"{prefix}attn.in_proj_weight_lora_B": (3 * WIDTH, 4),
                    f"{prefix}attn.out_proj.lora_A": (4, WIDTH), f"{prefix}attn.out_proj.lora_B": (WIDTH, 4),
                    f"{prefix}mlp.c_fc.lora_A": (4, WIDTH), f"{prefix}mlp.c_fc.lora_B": (4 * WIDTH, 4),
                    f"{prefix}mlp.c_proj.lora_A": (4, 4 * WIDTH), f"{prefix}mlp.c_proj.lora_B": (WIDTH, 4),
                }  # fmt: skip
    if lora:
        shapes |= {"visual.conv1.lora_A": (4 * PATCH, 3 * PATCH), "visual.conv1.lora_B": (WIDTH * PATCH, 4 * PATCH)}
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The independent computation: the official codes' formulas in float64, on the checkpoint's own names.


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight + bias


def transform(x, state, tower, activation, causal):
    tokens, head = x.shape[0], WIDTH // HEADS
    for number in range(LAYERS):
        w = {k.split(f"{tower}transformer.resblocks.{number}.")[1]: v for k, v in state.items()
             if k.startswith(f"{tower}transformer.resblocks.{number}.")}  # fmt: skip
        y = layer_norm(x, w["ln_1.weight"], w["ln_1.bias"])
        qkv = y @ w["attn.in_proj_weight"].T + w["attn.in_proj_bias"]
        if "attn.in_proj_weight_lora_A" in w:
            qkv = qkv + y @ w["attn.in_proj_weight_lora_A"].T @ w["attn.in_proj_weight_lora_B"].T / 4
        attended = []
        for h in range(HEADS):
            q, k, v = (part[:, h * head : (h + 1) * head] for part in qkv.split(WIDTH, dim=1))
            similarity = q @ k.T / head**0.5
            if causal:
                similarity = similarity + torch.full((tokens, tokens), -torch.inf).triu(1)
            attended.append(similarity.softmax(-1) @ v)
        y = torch.cat(attended, dim=1)
        out = y @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
        if "attn.out_proj.lora_A" in w:
            out = out + y @ w["attn.out_proj.lora_A"].T @ w["attn.out_proj.lora_B"].T / 4
        x = x + out
        y = layer_norm(x, w["ln_2.weight"], w["ln_2.bias"]) @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + y @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
    return x


def image_feature(pixels, state, activation):
    kernel = state["visual.conv1.weight"]
    if "visual.conv1.lora_A" in state:
        kernel = kernel + (state["visual.conv1.lora_B"] @ state["visual.conv1.lora_A"]).view(kernel.shape) / 4
    patches = [
        (kernel * pixels[:, i : i + PATCH, j : j + PATCH]).sum((1, 2, 3))
        for i in range(0, SIDE, PATCH)
        for j in range(0, SIDE, PATCH)
    ]
    x = torch.stack([state["visual.class_embedding"], *patches]) + state["visual.positional_embedding"]
    x = layer_norm(x, state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = transform(x, state, "visual.", activation, causal=False)
    x = layer_norm(x[0], state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    return x / x.norm()


def text_feature(text, state, activation):
    vocabulary = words()
    ids = [vocabulary["[CLS]"]]
    for word in text.lower().split():
        if word in vocabulary:
            ids.append(vocabulary[word])
        else:
            ids += [vocabulary[word[0]], *[vocabulary[f"##{c}"] for c in word[1:]]]
    ids = [*ids[: LENGTH - 1], vocabulary["[SEP]"]]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
    x = transform(x, state, "", activation, causal=True)
    x = layer_norm(x[-1], state["ln_final.weight"], state["ln_final.bias"]) @ state["text_projection"]
    return x / x.norm()


def expected_scores(state, images, weight, activation="quick_gelu", prefix="A photo depicts ", clip=True):
    state = {name: tensor.double() for name, tensor in state.items()}
    scores, with_references = [], []
    for image, caption, references in zip(images, CAPTIONS, REFERENCES, strict=True):
        image = torch.from_numpy(preprocess(image, SIDE)).double()
        c = text_feature(prefix + caption, state, activation)
        cosine = (image_feature(image, state, activation) @ c).item()
        nearest = max(0, *((text_feature(prefix + r, state, activation) @ c).item() for r in references))
        score = weight * (max(cosine, 0) if clip else cosine)
        scores.append(score)
        with_references.append(2 * score * nearest / (score + nearest) if score > 0 else 0)
    return np.array(scores), np.array(with_references)


def pictures():
    rng = np.random.default_rng(5)
    sizes = [(60, 80), (48, 48), (91, 53)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("clip")))


def write_checkpoint(path, state):
    torch.save({"state_dict": state, "epoch": 3}, path)
    return str(path)


@pytest.mark.parametrize(
    ("metric", "activation", "lora", "seed"),
    [("pac-s", "quick_gelu", False, 1), ("pac-s", "gelu", False, 2), ("pac-s++", "quick_gelu", True, 3)],
    ids=["OpenAI's ViT", "open_clip's ViT", "LoRA"],
)
def test_scores_of_each_layout_equal_a_computation_in_float64(tmp_path, metric, activation, lora, seed):
    state = random_state(seed, lora)
    state["visual.proj"] *= 1 if seed == 1 else -1  # so that the cosines are positive
    checkpoint = write_checkpoint(tmp_path / "pac.pth", state)
    folder = write_clip(tmp_path / "clip", activation=activation)
    scorer = ClipScorer.load(metric, str(folder), checkpoint)
    images, ids = pictures(), ["a", "b", "c"]
    expected, expected_ref = expected_scores(state, images, 2.0, activation)
    scores, with_references = scorer.score(ids, images, CAPTIONS, REFERENCES)
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    np.testing.assert_allclose(with_references, expected_ref, atol=2e-5)
    assert (expected > 0.05).any()


def test_a_cosine_below_zero_is_zero_in_the_score_and_kept_in_dicos_reward(clip_folder, tmp_path):
    images, state = pictures(), random_state(1)
    positive, _ = expected_scores(state, images, 2.0)
    assert (positive > 0.05).all()
    opposite = {**state, "visual.proj": -state["visual.proj"]}
    scorer = ClipScorer.load("pac-s", clip_folder, write_checkpoint(tmp_path / "pac.pth", opposite))
    scores, with_references = scorer.score("abc", images, CAPTIONS, REFERENCES)
    assert scores.tolist() == with_references.tolist() == [0, 0, 0]
    rewards, _ = scorer.score("abc", images, CAPTIONS, prefix="", clip=False)
    expected, _ = expected_scores(opposite, images, 2.0, prefix="", clip=False)
    np.testing.assert_allclose(rewards, expected, atol=2e-5)
    assert (expected < -0.05).all()


def test_clip_s_is_two_and_a_half_times_the_cosine(clip_folder):
    # The CLIP's weights under OpenAI's names are read back from transformers' own output.
    scorer = ClipScorer.load("clip-s", clip_folder)
    model, images = scorer.model.double(), pictures()
    pixels = torch.stack([torch.from_numpy(preprocess(image, SIDE)).double() for image in images])
    tokens = scorer.tokenizer(
        [f"A photo depicts {c}" for c in CAPTIONS],
        padding=True,
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    cosines = (output.logits_per_image / model.logit_scale.exp()).diag().numpy(force=True)
    model.float()
    scores, nothing = scorer.score("abc", images, CAPTIONS)
    np.testing.assert_allclose(scores, 2.5 * np.maximum(cosines, 0), atol=2e-5)
    assert nothing is None


def test_candidates_of_an_image_stand_together(clip_folder):
    scorer, images = ClipScorer.load("clip-s", clip_folder), pictures()[:2]
    four = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[2], CAPTIONS[0]]
    together, with_references = scorer.score("ab", images, four, REFERENCES[:2], clip=False)
    for place, (image, references) in enumerate(zip(images, REFERENCES[:2], strict=True)):
        for number in range(2):
            at = 2 * place + number
            alone, ref = scorer.score(f"{place}", [image], [four[at]], [references], clip=False)
            np.testing.assert_allclose(together[at], alone[0], atol=1e-5)
            np.testing.assert_allclose(with_references[at], ref[0], atol=1e-5)
    with pytest.raises(ValueError, match="3 captions cannot be divided evenly among 2 images"):
        scorer.score("ab", images, CAPTIONS)


def test_a_splits_scores_are_of_its_own_pictures_whatever_they_are_called(tmp_path):
    """train.py scores validation and test with one scorer; in a stream the pictures of both may be 0.png and 1.png."""
    rng = np.random.default_rng(2)
    for split in ("train", "validation", "test"):
        rows = []
        for n in range(2):
            picture = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 48))
            picture.save(file := io.BytesIO(), "PNG")
            rows.append({"image": {"path": f"{n}.png", "bytes": file.getvalue()}, "text": "a dog runs near the grass"})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    clip = CLIPModel.from_pretrained(write_clip(tmp_path / "clip"))
    clip.visual_projection.weight.data.neg_()  # so that cosines are positive
    clip.save_pretrained(tmp_path / "clip")
    more = ("--clip_metrics", "clip-s", "--clip_model", tmp_path / "clip", "--streaming", "true")
    values = {"max_steps": 1, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    tiny.run("train.py", *flags(tmp_path, tmp_path / "set", tmp_path / "out", **values), *more)
    scores, names = {}, {}
    for split, folder in (("validation", tmp_path / "out/validation"), ("test", tmp_path / "out")):
        tiny.run(
            "evaluate.py", "--model_name_or_path", tmp_path / "out", "--dataset_name", tmp_path / "set", "--split", split,
            "--output_dir", tmp_path / split, "--meteor", "false", "--spice", "false", *more,
        )  # fmt: skip
        one, other = (json.loads((of / "coco_metrics.json").read_text()) for of in (folder, tmp_path / split))
        assert one["CLIP-S"] == pytest.approx(other["CLIP-S"], abs=1e-6)
        scores[split] = one["CLIP-S"]
        names[split] = {row["image_id"] for row in json.loads((tmp_path / split / "predictions.json").read_text())}
    assert names["validation"] == names["test"]
    assert abs(scores["validation"] - scores["test"]) > 1e-4


def test_images_and_references_are_encoded_once(clip_folder):
    scorer, images = ClipScorer.load("clip-s", clip_folder), pictures()
    first = scorer.score("abc", images, CAPTIONS, REFERENCES)
    encoded = []
    scorer.model.text_model.register_forward_pre_hook(lambda *_, **kw: encoded.append("text"))
    scorer.model.vision_model.register_forward_pre_hook(lambda *_, **kw: encoded.append("image"))
    again = scorer.score("abc", [None] * 3, CAPTIONS, REFERENCES)
    np.testing.assert_array_equal(first, again)
    assert encoded == ["text"]  # the captions' own


def test_more_images_than_a_batch_are_scored_as_each_alone(clip_folder):
    scorer = ClipScorer.load("clip-s", clip_folder)
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in range(130)]
    features = scorer.image_features([str(i) for i in range(130)], images)
    for number in (0, 63, 64, 65, 128, 129):
        alone = ClipScorer.load("clip-s", clip_folder).image_features(["x"], [images[number]])
        torch.testing.assert_close(features[number], alone[0], atol=1e-5, rtol=0)


def test_more_texts_than_a_batch_are_encoded_as_each_alone(clip_folder):
    scorer = ClipScorer.load("clip-s", clip_folder)
    texts = [f"{one} {other}" for one in tiny.VOCABULARY[:24] for other in tiny.VOCABULARY[:24]]
    assert len(texts) > 512
    features = scorer.text_features([*texts, *texts[:9]])
    assert features.shape[0] == len(texts) + 9
    assert features[-9:].equal(features[:9])
    for number in range(0, len(texts), 50):
        assert features[number].allclose(scorer.text_features([texts[number]])[0], atol=1e-5)


def test_preprocessing_is_that_of_the_published_code():
    rng = np.random.default_rng(0)
    # The one that resizes by Pillow, as the published code does; CLIPImageProcessor resizes tensors where torchvision is.
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    # transformers' own processor agrees with torchvision where what is cropped is even.
    for height, width in ((300, 400), (224, 224), (501, 334), (100, 81)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        long = int(224 * max(height, width) / min(height, width))
        assert (long - 224) % 2 == 0
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(preprocess(image, 224), theirs, atol=1e-6)
    # Where it is odd, torchvision's CenterCrop rounds half a pixel to the even neighbour: 1.5 to 2.
    image = Image.fromarray(rng.integers(0, 256, (224, 227, 3), dtype=np.uint8))
    pixels = preprocess(image, 224, mean=(0, 0, 0), std=(1, 1, 1)).transpose(1, 2, 0) * 255
    np.testing.assert_allclose(pixels, np.asarray(image)[:, 2:226], atol=1e-4)


def test_preprocessing_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    bicubic = transforms.InterpolationMode.BICUBIC
    published = transforms.Compose([
        transforms.Resize(224, interpolation=bicubic), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    for height, width in ((300, 400), (224, 224), (224, 227), (501, 334), (100, 81), (333, 500), (1023, 77)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        np.testing.assert_allclose(preprocess(image, 224), published(image).numpy(), atol=1e-6)


def test_the_folder_says_how_its_images_are_normalised(tmp_path):
    folder = write_clip(tmp_path / "clip", mean=[0.5, 0.5, 0.5])
    assert tuple(load_clip(str(folder))[2]) == (0.5, 0.5, 0.5)


def test_a_long_caption_is_cut_and_keeps_its_end(clip_folder, test_data):
    folder = test_data / "clip-vit-base-patch32-tokenizer"
    scorer = ClipScorer.load("clip-s", clip_folder)
    scorer.tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = scorer.tokenizer(["A photo depicts " + "dog " * 200], truncation=True, max_length=77)["input_ids"][0]
    assert len(tokens) == 77
    assert tokens[0] == 49406
    assert tokens[-1] == 49407
    assert scorer.tokenizer("A photo depicts a dog.")["input_ids"] == [49406, 320, 1125, 29340, 320, 1929, 269, 49407]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_pac_s_without_its_checkpoint_is_refused(clip_folder):
    with pytest.raises(ValueError, match="pac-s is PAC-S only with its published weights: pass --pac_checkpoint"):
        ClipScorer.load("pac-s", clip_folder)
    with pytest.raises(ValueError, match="clip-s needs --clip_model"):
        load_scorers(SimpleNamespace(clip_metrics=["clip-s"], clip_model=None, pac_checkpoint=None))
    with pytest.raises(ValueError, match="'clip_s' is not a CLIP-based score"):
        ClipScorer.load("clip_s", clip_folder)


def test_a_checkpoint_that_does_not_fit_is_refused(clip_folder, tmp_path):
    state = random_state(1)

    def refused(match, state, metric="pac-s"):
        with pytest.raises(ValueError, match=match):
            ClipScorer.load(metric, clip_folder, write_checkpoint(tmp_path / "pac.pth", state))

    refused("lacks text_projection.weight", {k: v for k, v in state.items() if k != "text_projection"})
    refused(
        r"visual_projection.weight is \(23, 32\) instead of \(24, 32\)", {**state, "visual.proj": torch.ones(32, 23)}
    )
    refused(
        "'visual.layer1.0.conv1.weight' is not a parameter of a CLIP",
        {**state, "visual.layer1.0.conv1.weight": state["visual.proj"]},
    )
    refused("is a checkpoint of PAC-S: ask for pac-s, not pac-s\\+\\+", state, "pac-s++")
    lora = random_state(1, lora=True)
    refused("is a checkpoint of PAC-S\\+\\+: ask for pac-s\\+\\+", lora)
    refused("not of the published layout", {k: v for k, v in lora.items() if k != "visual.conv1.lora_B"}, "pac-s++")
    with pytest.raises(ValueError, match="there is no file"):
        ClipScorer.load("pac-s", clip_folder, str(tmp_path / "nothing.pth"))
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="is not one of PAC-S's published files"):
        ClipScorer.load("pac-s", clip_folder, str(tmp_path / "bare.pth"))


def test_a_pickle_with_code_is_refused_and_not_run(clip_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"state_dict": random_state(1), "args": Evil()}, tmp_path / "pac.pth")
    with pytest.raises(ValueError, match="is not one of PAC-S's published files"):
        ClipScorer.load("pac-s", clip_folder, str(tmp_path / "pac.pth"))
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_not_run(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import CLIPConfig, BertTokenizerFast\n"
    (folder / "own.py").write_text(code)
    for file, names in (
        ("config.json", {"AutoConfig": "own.CLIPConfig"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.BertTokenizerFast"]}),
    ):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | {"auto_map": names}))
    load_clip(str(folder))
    assert not (tmp_path / "ran").exists()


def test_plain_clip_weights_are_no_pac_s(clip_folder, tmp_path):
    state, model = random_state(1), load_clip(clip_folder)[0]
    state["visual.proj"], state["text_projection"] = (
        model.visual_projection.weight.detach().T,
        model.text_projection.weight.detach().T,
    )
    with pytest.raises(ValueError, match="with it the score would be CLIP-S"):
        ClipScorer.load("pac-s", clip_folder, write_checkpoint(tmp_path / "pac.pth", state))


def test_an_activation_that_cannot_be_the_checkpoints_is_refused(tmp_path):
    folder = write_clip(tmp_path / "clip", activation="gelu")
    checkpoint = write_checkpoint(tmp_path / "pac.pth", random_state(1, lora=True))
    with pytest.raises(ValueError, match="needs a clip_model with quick_gelu, not gelu"):
        ClipScorer.load("pac-s++", str(folder), checkpoint)


def test_a_folder_that_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a blip; a CLIP is needed"):
        load_clip(str(tiny.build_folder(tmp_path)))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_clip(str(tmp_path / "nothing"))


# ---------------------------------------------------------------------------------------------------------------------
# In evaluate.py


def test_intervals_are_those_of_the_same_resamples(clip_folder):
    from metrics.coco_caption.coco import resampled_sums

    scorer, images = ClipScorer.load("clip-s", clip_folder), pictures()
    references = dict(zip("abc", REFERENCES, strict=True))
    predictions = dict(zip("abc", CAPTIONS, strict=True))
    metrics, per_image = clip_scores([scorer], predictions, references, images, bootstrap_samples=200, seed=7)
    assert metrics["CLIP-S"] == pytest.approx(per_image["CLIP-S"].mean())
    means = resampled_sums(per_image["RefCLIP-S"].astype(float)[:, None], 200, 7)[:, 0] / 3
    assert metrics["intervals"]["RefCLIP-S"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())
    assert len(metrics["clip_weights"]["CLIP-S"]["sha256"]) == 64


def test_evaluate_prints_clip_scores_and_what_they_were_computed_with(clip_folder, tmp_path):
    captions = {f"photo{i}": [f"a {colour} ball.", "a circle"] for i, colour in enumerate(("red", "green", "blue"))}
    dataset = tiny.write_photos(tmp_path / "photos", captions, dict.fromkeys(captions, "test"))
    checkpoint = write_checkpoint(tmp_path / "pac.pth", random_state(1))
    options = (
        "--output_dir", tmp_path / "out", "--meteor", "false", "--spice", "false", "--bootstrap_samples", 20,
        "--clip_metrics", "clip-s", "pac-s", "--clip_model", clip_folder,
    )  # fmt: skip
    model = tiny.build_folder(tmp_path)
    captioning = ("--model_name_or_path", model, "--dataset_name", dataset, "--num_beams", 1, "--max_new_tokens", 5)
    refused = tiny.run("evaluate.py", *captioning, *options, fails=True)
    assert "pass --pac_checkpoint" in refused.stderr
    result = tiny.run("evaluate.py", *captioning, *options, "--pac_checkpoint", checkpoint)
    scores = json.loads((tmp_path / "out/coco_metrics.json").read_text())
    assert {"CLIP-S", "RefCLIP-S", "PAC-S", "RefPAC-S"} <= set(scores) & set(scores["intervals"])
    weights = scores["clip_weights"]
    assert weights["PAC-S"]["pac_checkpoint"] == checkpoint
    assert weights["PAC-S"]["sha256"] != weights["CLIP-S"]["sha256"]
    for name in ("CLIP-S", "PAC-S"):
        line = next(line for line in result.stderr.splitlines() if line.split()[:1] == [name])
        assert f"{scores[name]:.4f}" in line
        assert weights[name]["sha256"][:12] in line
    # The same captions from a file, the images from their folder.
    (tmp_path / "references.json").write_text(json.dumps({f"{name}.png": texts for name, texts in captions.items()}))
    again = ("--predictions", tmp_path / "out/predictions.json", "--references", tmp_path / "references.json")
    tiny.run(
        "evaluate.py", *again, *options, "--pac_checkpoint", checkpoint, "--image_dir", tmp_path / "photos",
        "--output_dir", tmp_path / "again",
    )  # fmt: skip
    rescored = json.loads((tmp_path / "again/coco_metrics.json").read_text())
    assert rescored["PAC-S"] == scores["PAC-S"]
    assert rescored["intervals"] == scores["intervals"]


def test_images_are_found_by_name_stem_and_coco_number(tmp_path):
    for name in ("COCO_val2014_000000391895.jpg", "dog.png", "000000000042.jpg"):
        (tmp_path / name).touch()
    names = ["COCO_val2014_000000391895.jpg", "dog.png", "000000000042.jpg"]
    for images in (["391895", "dog", "42"], ["391895", "dog.png", "000000000042.jpg"]):
        assert [path.name for path in find_images(tmp_path, dict.fromkeys(images))] == names
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").touch()
    found = find_images(tmp_path, {"7": [], "8": []}, {"7": "b/1.jpg", "8": "x/a/1.jpg"})
    assert found == [tmp_path / "b/1.jpg", tmp_path / "a/1.jpg"]
    with pytest.raises(ValueError, match="1: found in 2 places"):
        find_images(tmp_path, {"1": []})
    with pytest.raises(ValueError, match="lacks 1 of the 2 images"):
        find_images(tmp_path, {"dog": [], "cat": []})
    with pytest.raises(ValueError, match="pass --image_dir"):
        find_images(None, {"dog": []})
