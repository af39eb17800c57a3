"""Generation settings compared: the scores of each, which one is the best, and which others are as good."""

import dataclasses
from pathlib import Path

from metrics.clip_scores import NAMES
from metrics.comparison import paired_bootstrap
from metrics.java import preflight
from metrics.results import score_records

NOTE = (
    "p tells how often chance alone would show so large a difference from the best setting (paired bootstrap over the "
    "images, not corrected for the number of settings): where it is large, the cheaper setting is as good a choice. The "
    "best setting was chosen on these very captions, so its own score is flattering: report another split's."
)
SHOWN = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "sacrebleu", "METEOR", "SPICE")


def check_sweep(args, metric_args, model: str) -> None:
    """ValueError, before anything is captioned, if the sweep of these EvaluateArguments cannot end well."""
    if args.predictions:
        raise ValueError("--sweep captions with several settings, and with --predictions nothing is captioned.")
    clip = [prefix + NAMES[name] for name in metric_args.clip_metrics if name in NAMES for prefix in ("", "Ref")]
    if args.sweep_metric not in (*SHOWN, *clip):
        raise ValueError(f"--sweep_metric {args.sweep_metric}: choose one of {', '.join((*SHOWN, *clip))}.")
    asked = {"meteor": args.sweep_metric == "METEOR", "spice": args.sweep_metric == "SPICE"}
    if reason := preflight(**asked).get(args.sweep_metric):
        raise ValueError(f"--sweep_metric {args.sweep_metric}: {reason}")
    if args.save_best_sweep and not Path(model, "config.json").is_file():
        raise ValueError(f"--save_best_sweep writes into the model's folder, and {model} is none.")


def score_sweep(
    settings: list[dict], captions: list[dict], records, metric: str, metric_args, seed: int, **how
) -> dict:
    """What sweep.json holds: {"metric", "best": place of the best setting, "settings": [{"settings", "rank", "scores",
    "interval", "mean_length", "p"}], "note"}.

    Args:
        settings: of each run; captions: its `{image_id: caption}`. Equal captions are scored once.
        metric: names the best. METEOR and SPICE are computed if they are asked for here, and else not.
        how: for metrics.results.score_records.
    """
    asked = dataclasses.replace(metric_args, meteor=metric == "METEOR", spice=metric == "SPICE")
    scored, found = {}, []
    for of_one in captions:
        texts = tuple(of_one.values())
        if texts not in scored:
            scored[texts] = score_records(of_one, records, asked, seed, **how)
        found.append(scored[texts])
    if found[0][0][metric] is None:
        raise ValueError(f"sweep_metric: {metric} failed, {found[0][0]['unavailable'][metric]}. The captions are kept.")
    order = sorted(range(len(found)), key=lambda place: -found[place][0][metric])  # stable: the first of equal ones
    best = order[0]
    p = {}
    if asked.bootstrap_samples >= 100:
        for texts, (_, rows) in scored.items():
            p[texts] = paired_bootstrap(found[best][1], rows, asked.bootstrap_samples, seed, metric)[metric]["p"]
    table = [
        {
            "settings": setting,
            "rank": order.index(place) + 1,
            "scores": {name: scores[name] for name in dict.fromkeys((metric, *SHOWN)) if scores.get(name) is not None},
            "interval": scores["intervals"].get(metric),
            "mean_length": scores["corpus"]["mean_length"],
            "p": None if place == best else p.get(tuple(captions[place].values())),
        }
        for place, (setting, (scores, _)) in enumerate(zip(settings, found, strict=True))
    ]
    return {"metric": metric, "best": best, "settings": table, "note": NOTE}


def summary(sweep: dict) -> str:
    """The table in lines for people, the best first."""
    metric, rows = sweep["metric"], sorted(sweep["settings"], key=lambda row: row["rank"])
    lines = []
    for row in rows:
        setting = "  ".join(f"{key} {value}" for key, value in row["settings"].items())
        between = "  [{:.4f}, {:.4f}]".format(*row["interval"]) if row["interval"] else ""
        p = "" if row["p"] is None else f"  p {row['p']:.3f}"
        words = f"{row['mean_length']:.1f} words"
        lines.append(f"  {setting}  {metric} {row['scores'][metric]:.4f}{between}  {words}{p}")
    return "\n".join(lines)
