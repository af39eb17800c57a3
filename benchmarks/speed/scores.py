"""Speed of scores and rewards compared with pycocoevalcap.

    CAPTION_TEST_DATA=... python -m benchmarks.speed.scores [--repeats 5] [--output benchmarks/results/scores.json]

(a) COCO Karpathy test, 5,000 images: BLEU-1..4, ROUGE-L, CIDEr and METEOR, tokenization included. The predictions are each
    image's first reference, the references are the others, so that the captions are as varied as human ones.
(b) The CIDEr-D reward of 5 candidates for each of 64 images with 5 references, document frequencies from those 64
    images. pycocoevalcap takes one candidate per image, so it is called five times.

The two sides take turns, in fresh state; every repeat checks that results are equal. Run nothing else on the machine.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import RESULTS
from common.files import write_json
from common.provenance import environment
from data.caption_files import load_references
from metrics import CiderD, tokenize
from metrics.coco_caption import tokenizer as tokenizer_module
from metrics.coco_caption.coco import score
from metrics.coco_caption.java import find_java


def pycocoevalcap_scores(predictions: dict, references: dict) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = PTBTokenizer().tokenize({k: [{"caption": c} for c in captions] for k, captions in references.items()})
    res = PTBTokenizer().tokenize({k: [{"caption": predictions[k]}] for k in references})
    scores = dict(
        zip(["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"], Bleu(4).compute_score(gts, res, verbose=0)[0], strict=True)
    )
    for name, scorer in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        scores[name] = float(scorer.compute_score(gts, res)[0])
    return scores


def our_scores(predictions: dict, references: dict) -> dict[str, float]:
    tokenizer_module._chunks.clear()  # as in a fresh process
    return score(predictions, references, spice=False, bootstrap_samples=0)[0]


def pycocoevalcap_rewards(candidates: list[list[list[str]]], references: list[list[list[str]]]) -> np.ndarray:
    from pycocoevalcap.cider.cider import Cider

    gts = {i: [" ".join(tokens) for tokens in captions] for i, captions in enumerate(references)}
    rewards = []
    for k in range(len(candidates[0])):
        res = {i: [" ".join(image[k])] for i, image in enumerate(candidates)}
        rewards.append(Cider().compute_score(gts, res)[1])
    return np.stack(rewards, axis=1)


def seconds(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def summary(theirs: list[float], ours: list[float]) -> dict:
    def spread(values: list[float]) -> dict:
        return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values), "all_s": values}

    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "pycocoevalcap": spread(theirs),
        "ours": spread(ours),
        "speedup": statistics.median(theirs) / statistics.median(ours),
        "speedup_of_each_repeat": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "scores.json")
    arguments = parser.parse_args()
    data = os.environ.get("CAPTION_TEST_DATA")
    if not data:
        parser.error("set CAPTION_TEST_DATA to the folder of test data")
    if find_java() is None:
        parser.error("no Java found: pycocoevalcap needs it")
    os.environ["PATH"] = f"{Path(find_java()).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["JAVA_TOOL_OPTIONS"] = "-Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8"  # for both sides

    everything = load_references(Path(data) / "coco_karpathy_test/captions_karpathy_test.json")
    predictions = {image: captions[0] for image, captions in everything.items()}
    references = {image: captions[1:] for image, captions in everything.items()}
    theirs, ours = [], []
    for repeat in range(arguments.repeats):
        their_time, expected = seconds(pycocoevalcap_scores, predictions, references)
        our_time, scores = seconds(our_scores, predictions, references)
        for name, value in expected.items():
            assert abs(scores[name] - value) < 1e-9, (name, scores[name], value)
        theirs.append(their_time)
        ours.append(our_time)
        print(f"scores  {repeat + 1}: pycocoevalcap {their_time:.2f} s, ours {our_time:.2f} s", flush=True)
    result_scores = summary(theirs, ours)

    images = list(everything)[: 64 * 2]
    reward_references = [tokenize(everything[image][:5]) for image in images[:64]]
    others = [tokenize(everything[image][:5]) for image in images[64:]]
    # Partly right candidates: the first half of one of the image's captions, the second half of another image's.
    candidates = [
        [own[k][: len(own[k]) // 2] + other[k][len(other[k]) // 2 :] for k in range(5)]
        for own, other in zip(reward_references, others, strict=True)
    ]
    scorer = CiderD.from_references(reward_references)
    flat = [tokens for image in candidates for tokens in image]
    theirs, ours = [], []
    for repeat in range(max(arguments.repeats, 5) * 4):
        their_time, expected = seconds(pycocoevalcap_rewards, candidates, reward_references)
        our_time, rewards = seconds(scorer.score, flat, reward_references)
        np.testing.assert_allclose(rewards.reshape(64, 5), expected, atol=1e-9)
        if repeat:  # the first call of each side warms caches
            theirs.append(their_time)
            ours.append(our_time)
    result_reward = summary(theirs, ours)
    print(f"scores: {result_scores['speedup']:.2f}x, reward: {result_reward['speedup']:.1f}x")

    java = subprocess.run([find_java(), "-version"], capture_output=True, text=True).stderr.splitlines()[-1]
    record = {
        "coco_karpathy_test_scores": result_scores | {"images": len(references), "target": 2.5},
        "cider_d_reward": result_reward | {"candidates": 5, "images": 64, "references": 5, "target": 20},
        "java": java,
        **environment(),
    }
    write_json(arguments.output, record)


if __name__ == "__main__":
    main()
