"""The share of facts in captions of the quickstart's scenes that the scene makes true.

N-gram scores flatter templated captions: a model that names every wrong colour still gets a CIDEr above 2. Here a caption
is read back into facts, and these are compared with the scene's own. The definition, exactly:

- A scene with n groups of objects and r relations has 4n + r facts: each group's count, size, colour and shape, and each
  relation. (`drawn_scenes.drawing` draws n = 2, r = 1: nine facts. Each of its reference captions says all nine.)
- The groups that a caption mentions are paired with the scene's, one to one, as many as possible, so that the most
  facts are true. Order of mention is free.
- A count, size, colour or shape is true if the paired group has it. Left out, wrong, or said in two contradicting ways
  are all the same: a fact of the scene that the caption does not state.
- A relation is true if it holds between the paired groups; "a above b" is the same relation as "b below a".
- The score is true facts / (facts of the scene + facts invented). Invented is all that is said of a group without a
  partner, and the relations claimed beyond as many as the scene has.

So a reference scores 1, an empty caption 0, one wrong or missing word of nine 8/9, and one invented red star (count,
colour, shape) next to nine true facts 9/12. Over a corpus, true facts and facts are summed before dividing.
"""

import itertools
import json
import re
from collections import Counter

from common.errors import UserError

ATTRIBUTES = ("count", "size", "colour", "shape")
KINDS = (*ATTRIBUTES, "relation")
WORDS = {  # word -> what it says of the group that it belongs to
    **dict.fromkeys(("a", "an", "one", "single"), ("count", 1)),
    **dict.fromkeys(("two", "pair", "couple"), ("count", 2)),
    **dict.fromkeys(("three", "trio"), ("count", 3)),
    **dict.fromkeys(("four", "quartet"), ("count", 4)),
    **dict.fromkeys(("small", "little", "tiny"), ("size", "small")),
    **dict.fromkeys(("large", "big", "huge"), ("size", "large")),
    **{
        colour: ("colour", colour)
        for colour in ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
    },
    "violet": ("colour", "purple"),
    **dict.fromkeys(("circle", "circles", "disc", "discs"), ("shape", "circle")),
    **dict.fromkeys(("square", "squares", "box", "boxes"), ("shape", "square")),
    **dict.fromkeys(("triangle", "triangles"), ("shape", "triangle")),
    **dict.fromkeys(("star", "stars"), ("shape", "star")),
    **dict.fromkeys(("heart", "hearts"), ("shape", "heart")),
    **dict.fromkeys(("cross", "crosses", "plus"), ("shape", "cross")),
    **dict.fromkeys(("ring", "rings", "hoop", "hoops"), ("shape", "ring")),
    **dict.fromkeys(("crescent", "crescents", "moon", "moons"), ("shape", "crescent")),
}
RELATIONS = {
    **{"left": "left of", "right": "right of"},
    **dict.fromkeys(("above", "over", "higher than", "on top of", "top"), "above"),
    **dict.fromkeys(("below", "under", "beneath", "underneath", "lower than", "bottom"), "below"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
EVENT = re.compile(
    r"\b(?:"
    r"(?:(?P<its>its|their) )?(?P<side>left|right)(?: side)?(?P<of> of)?(?P<of_it> it| them)?"
    r"|(?P<place>(?:at the |up )(?:top|bottom)|down below)"
    r"|(?P<height>above|over|higher than|on top of|below|under|beneath|underneath|lower than)(?P<it> it| them)?"
    r"|(?P<word>[a-z]+)"
    r")\b"
)


def score_scene_facts(predictions: dict[str, str], facts: dict[str, dict | str]) -> dict[str, float]:
    """Corpus score.

    Args:
        predictions: image id -> caption.
        facts: image id -> facts of the scene, as `drawn_scenes.drawing` writes them (a dict, or its JSON string).

    Returns:
        `scene_facts`, and the same share among facts of one kind: `count`, `size`, `colour`, `shape`, `relation`.
    """
    if predictions.keys() != facts.keys():
        missing, extra = sorted(facts.keys() - predictions.keys()), sorted(predictions.keys() - facts.keys())
        raise UserError(
            f"scene_facts: ids of predictions and scenes differ: {len(missing)} scenes have no caption {missing[:3]}, "
            f"{len(extra)} captions have no scene {extra[:3]}"
        )
    if not facts:
        raise UserError("scene_facts: no captions to score")
    true, total = Counter(), Counter()
    for image_id, scene in facts.items():
        of_this = scene_facts(predictions[image_id], json.loads(scene) if isinstance(scene, str) else scene)
        true += of_this[0]
        total += of_this[1]
    return {"scene_facts": true.total() / total.total()} | {
        fact: true[fact] / total[fact] for fact in KINDS if total[fact]
    }


def scene_facts(caption: str, facts: dict) -> tuple[Counter, Counter]:
    """Facts that `caption` makes true and facts in all (those of the scene and those invented), by kind."""
    parsed = parse(caption)
    groups, mentions = facts["objects"], parsed["objects"]
    relations = {direct(*relation) for relation in facts["relations"]}
    best = None
    numbers = [*range(len(mentions)), *[None] * max(0, len(groups) - len(mentions))]
    for pairing in itertools.permutations(numbers, len(groups)):  # pairing[group] = mention
        true, total = Counter(), Counter(relation=len(relations))
        for group, mention in zip(groups, pairing, strict=True):
            for attribute in ATTRIBUTES:
                total[attribute] += 1
                true[attribute] += mention is not None and mentions[mention].get(attribute) == group[attribute]
        for mention in set(range(len(mentions))) - set(pairing):
            total.update(mentions[mention].keys())
        group_of = {mention: group for group, mention in enumerate(pairing) if mention is not None}
        claims = {
            direct(group_of.get(a, f"extra {a}"), r, group_of.get(b, f"extra {b}")) for a, r, b in parsed["relations"]
        }
        true["relation"] = len(claims & relations)
        total["relation"] = max(len(claims), len(relations))
        if best is None or (true.total(), -total.total()) > (best[0].total(), -best[1].total()):
            best = true, total
    return best


def direct(a: int | str, relation: str, b: int | str) -> tuple:
    """One way of saying a relation: "left of" for "right of", "above" for "below"."""
    return (b, INVERSE[relation], a) if relation in ("right of", "below") else (a, relation, b)


def parse(caption: str) -> dict:
    """Read a caption into the form of a scene's facts; what is not stated is absent, what contradicts itself is None.

    A group begins with its count ("two", "a pair of", "a") or, without one, with the adjectives before its noun.
    Adjectives after the noun ("a star, small and red") belong to it. Unknown words are skipped.
    """
    words = list(EVENT.finditer(" ".join(re.findall("[a-z]+", caption.lower()))))
    mentions, relations = [], []  # relations: (relation, whether a place or to a pronoun or to a noun, mentions so far)
    for position, match in enumerate(words):
        if match["side"]:
            placed_by = "pronoun" if match["its"] or match["of_it"] else "noun" if match["of"] else "place"
            relations.append((RELATIONS[match["side"]], placed_by, len(mentions)))
        elif match["place"]:
            relations.append((RELATIONS[match["place"].split()[-1]], "place", len(mentions)))
        elif match["height"]:
            relations.append((RELATIONS[match["height"]], "pronoun" if match["it"] else "noun", len(mentions)))
        elif match["word"] in WORDS:
            attribute, value = WORDS[match["word"]]
            group = mentions[-1] if mentions else None
            if group is None:
                new = True
            elif attribute == "count":  # "a pair of", "a group of four", "a picture of two": the later word counts
                new = group.keys() != {"count"}
            else:
                new = "shape" in group and (attribute == "shape" or noun_follows(words[position + 1 :]))
            if new:
                group = {}
                mentions.append(group)
            group[attribute] = value if attribute == "count" or group.get(attribute, value) == value else None
    if mentions and mentions[-1].keys() == {"count"}:  # "... in a row": not a group
        mentions.pop()
    return {"objects": mentions, "relations": sorted(resolve(relations, len(mentions)))}


def noun_follows(words: list[re.Match]) -> bool:
    """Whether a noun comes before the next count, place or relation."""
    for match in words:
        if match["word"] is None or WORDS.get(match["word"], ("",))[0] == "count":
            return False
        if WORDS.get(match["word"], ("",))[0] == "shape":
            return True
    return False


def resolve(relations: list[tuple[str, str, int]], mentions: int) -> set[tuple[int, str, int]]:
    """Which two mentions each relation is between."""
    claims, places = set(), {}
    places_lead = None  # "on the left a star, on the right a ring", not "a star on the left and a ring on the right"
    for relation, placed_by, before in relations:
        if placed_by == "place":
            if places_lead is None:
                places_lead = before == 0
            place_of = before if places_lead and before < mentions else before - 1
            if place_of >= 0:
                places[place_of] = relation
        elif placed_by == "pronoun" and before >= 2:  # "a ring with a star above it"
            claims.add((before - 1, relation, before - 2))
        elif before == 0 or placed_by == "pronoun":  # "above a ring is a star", "a ring, and above it a star"
            if mentions >= 2:
                claims.add((1, relation, 0))
        elif before < mentions:  # "a star above a ring"
            claims.add((before - 1, relation, before))
    for one, other in itertools.combinations(range(mentions), 2):
        if one in places and places.get(other) in (None, INVERSE[places[one]]):
            claims.add((one, places[one], other))
        elif other in places and one not in places:
            claims.add((other, places[other], one))
    return {(a, relation, b) for a, relation, b in claims}
