"""CHAIR: which of COCO's 80 object categories a caption names that are not in the image.

Rohrbach et al., "Object Hallucination in Image Captioning" (EMNLP 2018). CHAIRs is the share of captions with such an
object, CHAIRi the share of named objects that are wrong. An image's objects are those of its instances and those that
its reference captions name. The words of the categories, the word pairs and the singular forms are those of the published
implementation, its faults included: "bus" becomes "bu", so that one bus in a caption is never seen, and "motor bike" and
"cheesecake" are not objects. Numbers in papers have these faults.
"""

import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from metrics.coco_caption.coco import resampled_scores

# Each category and the words that name it, as they were published (LisaAnne/Hallucination, data/synonyms.txt).
CATEGORIES = {
    "person": "girl boy man woman kid child chef baker people adult rider children baby worker passenger sister biker "
    "policeman cop officer lady cowboy bride groom male female guy traveler mother father gentleman pitcher player skier "
    "snowboarder skater skateboarder foreigner caller offender coworker trespasser patient politician soldier grandchild "
    "serviceman walker drinker doctor bicyclist thief buyer teenager student camper driver solider hunter shopper villager",
    "bicycle": "bike unicycle minibike trike",
    "car": "automobile van minivan sedan suv hatchback cab jeep coupe taxicab limo taxi",
    "motorcycle": "scooter motor_cycle motorbike moped",
    "airplane": "jetliner plane air_plane monoplane aircraft jet airbus biplane seaplane",
    "bus": "minibus trolley",
    "train": "locomotive tramway caboose",
    "truck": "pickup lorry hauler firetruck",
    "boat": "ship liner sailboat motorboat dinghy powerboat speedboat canoe skiff yacht kayak catamaran pontoon houseboat "
    "vessel rowboat trawler ferryboat watercraft tugboat schooner barge ferry sailboard paddleboat lifeboat freighter "
    "steamboat riverboat battleship steamship",
    "traffic light": "street_light traffic_signal stop_light streetlight stoplight",
    "fire hydrant": "hydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "pew",
    "bird": "ostrich owl seagull goose duck parakeet falcon robin pelican waterfowl heron hummingbird mallard finch pigeon "
    "sparrow seabird osprey blackbird fowl shorebird woodpecker egret chickadee quail bluebird kingfisher buzzard willet "
    "gull swan bluejay flamingo cormorant parrot loon gosling waterbird pheasant rooster sandpiper crow raven turkey oriole "
    "cowbird warbler magpie peacock cockatiel lorikeet puffin vulture condor macaw peafowl cockatoo songbird",
    "cat": "kitten feline tabby",
    "dog": "puppy beagle pup chihuahua schnauzer dachshund rottweiler canine pitbull collie pug terrier poodle labrador "
    "doggie doberman mutt doggy spaniel bulldog sheepdog weimaraner corgi cocker greyhound retriever brindle hound whippet "
    "husky",
    "horse": "colt pony racehorse stallion equine mare foal palomino mustang clydesdale bronc bronco",
    "sheep": "lamb ram goat ewe",
    "cow": "cattle oxen ox calf holstein heifer buffalo bull zebu bison",
    "elephant": "",
    "bear": "panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "knapsack",
    "umbrella": "",
    "handbag": "wallet purse briefcase",
    "tie": "bow bow_tie",
    "suitcase": "suit_case luggage",
    "frisbee": "",
    "skis": "ski",
    "snowboard": "",
    "sports ball": "ball",
    "kite": "",
    "baseball bat": "",
    "baseball glove": "",
    "skateboard": "",
    "surfboard": "longboard skimboard shortboard wakeboard",
    "tennis racket": "racket",
    "bottle": "",
    "wine glass": "",
    "cup": "",
    "fork": "",
    "knife": "pocketknife knive",
    "spoon": "",
    "bowl": "container",
    "banana": "",
    "apple": "",
    "sandwich": "burger sub cheeseburger hamburger",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "",
    "pizza": "",
    "donut": "doughnut bagel",
    "cake": "cupcake shortcake coffeecake pancake",
    "chair": "seat stool",
    "couch": "sofa recliner futon loveseat settee chesterfield",
    "potted plant": "houseplant",
    "bed": "",
    "dining table": "table desk",
    "toilet": "urinal commode lavatory potty",
    "tv": "monitor televison television",
    "laptop": "computer notebook netbook lenovo macbook laptop_computer",
    "mouse": "",
    "remote": "",
    "keyboard": "",
    "cell phone": "mobile_phone phone cellphone telephone phon smartphone iPhone",
    "microwave": "",
    "oven": "stovetop stove stove_top_oven",
    "toaster": "",
    "sink": "",
    "refrigerator": "fridge freezer",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "teddybear",
    "hair drier": "hairdryer",
    "toothbrush": "",
}
_CATEGORY_OF = {
    word.replace("_", " "): category
    for category, words in CATEGORIES.items()
    for word in (category.replace(" ", "_"), *words.split())
}

# Two words that are one: (first, second) -> what they count as.
_PAIRS = {
    tuple(pair.split("_")): pair.replace("_", " ")
    for pair in str.split(
        "motor_bike motor_cycle air_plane traffic_light street_light traffic_signal stop_light fire_hydrant stop_sign "
        "parking_meter suit_case sports_ball baseball_bat baseball_glove tennis_racket wine_glass hot_dog cell_phone "
        "mobile_phone teddy_bear hair_drier potted_plant laptop_computer home_plate train_track"
    )
}
_ANIMALS = str.split("bird cat dog horse sheep cow elephant bear zebra giraffe animal cub")
_PAIRS |= {(age, animal): animal for age in ("baby", "adult") for animal in _ANIMALS}  # a baby bird is not a person
_PAIRS |= {("passenger", vehicle): vehicle for vehicle in ("jet", "train")}
_PAIRS |= {("bow", "tie"): "tie", ("toilet", "seat"): "toilet", ("wine", "glas"): "wine glass"}


def objects_of(caption: str) -> list[str]:
    """The categories that a caption names, in its order, as often as it names them.

    >>> objects_of("Two men ride a bus past the toilet seat.")
    ['person', 'toilet']
    """
    words = [singular(word) for word in _words(caption.lower())]
    mentions, place = [], 0
    while place < len(words):
        pair = _PAIRS.get(tuple(words[place : place + 2]))
        mentions.append(pair or words[place])
        place += 2 if pair else 1
    if "toilet" in mentions and "seat" in mentions:
        mentions = [word for word in mentions if word != "seat"]
    return [_CATEGORY_OF[word] for word in mentions if word in _CATEGORY_OF]


def objects_there(references: Iterable[str], instances: Iterable[str] = ()) -> set[str]:
    """The categories in an image: those of its instances, and those that its reference captions name."""
    return {*instances, *itertools.chain(*map(objects_of, references))}


def chair_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    instances: Mapping[str, Iterable[str]],
    *,
    bootstrap_samples: int = 0,
    seed: int = 0,
) -> tuple[dict, dict[str, dict]]:
    """({"CHAIRs", "CHAIRi", "object_recall", "intervals"}, {image id: what its caption names and misses}).

    Recall is the share of the images' objects that the captions name. Per image: "objects", the categories named;
    "hallucinated", those that are not there; "missed", those that are there but not named; "statistics", the counts that
    CHAIRi and recall are shares of, {name: [part, whole]}.

    Args:
        predictions: {image id: caption}; references: {image id: captions}.
        instances: {image id: categories}, from read_instances.
    """
    rows = {}
    for image, captions in references.items():
        present = objects_there(captions, instances.get(image, ()))
        named = objects_of(predictions[image])
        wrong = [name for name in named if name not in present]
        rows[image] = {
            "objects": sorted(set(named)),
            "hallucinated": sorted(set(wrong)),
            "missed": sorted(present - set(named)),
            "statistics": {
                "CHAIRi": [len(wrong), len(named)],
                "object_recall": [len(present & set(named)), len(present)],
            },
        }
    counts = {
        name: np.array([row["statistics"][name] for row in rows.values()], float)
        for name in ("CHAIRi", "object_recall")
    }
    counts["CHAIRs"] = (counts["CHAIRi"][:, 0] > 0).astype(float)
    shares = {name: counts[name].sum(axis=0) for name in ("CHAIRi", "object_recall")}
    scores = {"CHAIRs": float(counts["CHAIRs"].mean())}
    scores |= {name: float(part / whole) if whole else 0.0 for name, (part, whole) in shares.items()}
    scores["intervals"] = {}
    if bootstrap_samples:
        resampled = resampled_scores(counts, bootstrap_samples, seed)
        scores["intervals"] = {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in resampled.items()}
    return scores, rows


def read_instances(path: str | os.PathLike) -> dict[str, set[str]]:
    """{image id: categories in it} of COCO's instances file, with or without boxes. ValueError if it is not one, or if
    its categories are not COCO's."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {category["id"]: category["name"] for category in content["categories"]}
        names_of: dict[str, set[str]] = {str(image["id"]): set() for image in content["images"]}
        for annotation in content["annotations"]:
            names_of.setdefault(str(annotation["image_id"]), set()).add(names[annotation["category_id"]])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"instances: {path} is not COCO's instances file (such as instances_val2014.json), with images, annotations "
            f"and categories: {error!r}."
        ) from None
    if unknown := sorted(set(names.values()) - set(_CATEGORY_OF)):
        raise UserError(f"instances: {path} has a category that is not COCO's: {unknown[0]!r}. CHAIR knows COCO's 80.")
    return {image: {_CATEGORY_OF[name] for name in objects} for image, objects in names_of.items()}


# ---------------------------------------------------------------------------------------------------------------- words

# Where NLTK's word_tokenize puts a space, in its order: (pattern, replacement).
_SPLITS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([«“‘„]|`+)", r" \1 "),
        (r'^"', " `` "),
        (r'([ (\[{<])("|\'\')', r"\1 `` "),
        (r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' "),
        (r"([^.])(\.)([\])}>\"'»”’ ]*)\s*$", r"\1 \2 \3 "),
        (r"([:,])([^\d])", r" \1 \2"),
        (r"([:,])$", r" \1 "),
        (r"(\.{2,})", r" \1 "),
        (r"([;@#$%&?!*\u2012-\u2015])", r" \1 "),
        (r"([^'])' ", r"\1 ' "),
        (r"([\]\[(){}<>])", r" \1 "),
        (r"(--)", r" \1 "),
        (r"([»”’])", r" \1 "),
        (r"(''|\")", r" '' "),
        (r"^(.*)$", r" \1 "),
        (r"([^' ])('[smd]|') ", r"\1 \2 "),
        (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
        (r"\b(can)(not)\b", r" \1 \2 "),
        (r"\b(d)('ye)\b", r" \1 \2 "),
        (r"\b(gim|lem)(me)\b", r" \1 \2 "),
        (r"\b(gon|wan)(na)\b", r" \1 \2 "),
        (r"\b(got)(ta)\b", r" \1 \2 "),
        (r"\b(more)('n)\b", r" \1 \2 "),
        (r" ('t)(is|was)\b", r" \1 \2 "),
    )
]
_SENTENCE_END = re.compile(r"(?<=[.!?])[\])}\"'»”’]*\s+|\n+")


def _words(text: str) -> list[str]:
    """The words of a lower-cased text as NLTK's word_tokenize cuts it, a full stop within it ending a sentence."""
    words = []
    start = 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[start:end].strip()
        for pattern, replacement in _SPLITS:
            sentence = pattern.sub(replacement, sentence)
        words += sentence.split()
        start = end
    return words


# Singular forms as pattern.en 2.6 makes them. A word is kept if one of these ends with it, however short it is.
_KEPT = str.split(
    "bison debris headquarters pincers trout bream diabetes herpes pliers tuna breeches djinn high-jinks proceedings whiting "
    "britches eland homework rabies wildebeest carp elk innings salmon chassis flounder jackanapes scissors christmas gallows "
    "mackerel series clippers georgia measles shears cod graffiti mews species contretemps mumps swine corps news swiss "
    "advice equipment happiness luggage software bread fruit information mathematics progress understanding butter furniture "
    "ketchup mayonnaise research water cheese garbage knowledge meat rice electricity gravel love mustard sand"
)
_KEPT_ENDINGS = frozenset(word[start:] for word in _KEPT for start in range(len(word) + 1))
_IN_IE = tuple(
    f"{word}s"
    for word in str.split(
        "alergie cutie hoagie newbie softie veggie auntie doggie hottie nightie sortie weenie beanie eyrie indie oldie "
        "stoolie yuppie birdie freebie junkie ^pie sweetie zombie bogie goonie laddie pixie techie bombie groupie laramie "
        "quickie ^tie collie hankie lingerie reverie toughie cookie hippie meanie rookie valkyrie"
    )
)
_IRREGULAR = dict(
    pair.split(":")
    for pair in str.split(
        "atlantes:atlas atlases:atlas axes:axe beeves:beef brethren:brother children:child corpora:corpus corpuses:corpus "
        "ephemerides:ephemeris feet:foot ganglia:ganglion geese:goose genera:genus genii:genie graffiti:graffito "
        "helves:helve kine:cow leaves:leaf loaves:loaf men:man mongooses:mongoose monies:money moves:move mythoi:mythos "
        "numena:numen occipita:occiput octopodes:octopus opera:opus opuses:opus our:my oxen:ox penes:penis penises:penis "
        "people:person sexes:sex soliloquies:soliloquy teeth:tooth testes:testis trilbys:trilby turves:turf zoa:zoon"
    )
)
_ENDINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(.)ae$", r"\1a"), (r"(.)itis$", r"\1itis"), (r"(.)eaux$", r"\1eau"), (r"(quiz)zes$", r"\1"),
        (r"(matr)ices$", r"\1ix"), (r"(ap|vert|ind)ices$", r"\1ex"), (r"^(ox)en", r"\1"), (r"(alias|status)es$", r"\1"),
        (r"([octop|vir])i$", r"\1us"), (r"(cris|ax|test)es$", r"\1is"), (r"(shoe)s$", r"\1"), (r"(o)es$", r"\1"),
        (r"(bus)es$", r"\1"), (r"([m|l])ice$", r"\1ouse"), (r"(x|ch|ss|sh)es$", r"\1"), (r"(m)ovies$", r"\1ovie"),
        (r"(.)ombies$", r"\1ombie"), (r"(s)eries$", r"\1eries"), (r"([^aeiouy]|qu)ies$", r"\1y"),
        (r"([aeo]l)ves$", r"\1f"), (r"([^d]ea)ves$", r"\1f"), (r"arves$", "arf"), (r"erves$", "erve"),
        (r"([nlw]i)ves$", r"\1fe"), (r"([lr])ves$", r"\1f"), (r"([aeo])ves$", r"\1ve"), (r"(sive)s$", r"\1"),
        (r"(tive)s$", r"\1"), (r"(hive)s$", r"\1"), (r"([^f])ves$", r"\1fe"), (r"(^analy)ses$", r"\1sis"),
        (r"(analy|ba|diagno|parenthe|progno|synop|the)ses$", r"\1sis"), (r"(.)opses$", r"\1opsis"),
        (r"(.)yses$", r"\1ysis"), (r"(h|d|r|o|n|b|cl|p)oses$", r"\1ose"),
        (r"(fruct|gluc|galact|lact|ket|malt|rib|sacchar|cellul)ose$", r"\1ose"), (r"(.)oses$", r"\1osis"),
        (r"([ti])a$", r"\1um"), (r"(n)ews$", r"\1ews"), (r"s$", ""),
    )
]  # fmt: skip
_PREPOSITIONS = frozenset(
    str.split(
        "about before during of till above behind except off to across below for on under after beneath from onto until among "
        "beside in out unto around besides into over upon at between near since with athwart betwixt beyond but by"
    )
)


@functools.lru_cache(100_000)
def singular(word: str) -> str:
    """The singular of a lower-case word according to pattern.en: "bu" for "bus", "ty" for "ties"."""
    first, *tail = word.split("-")
    if tail and tail[0] in _PREPOSITIONS:
        return f"{singular(first)}-{'-'.join(tail)}"
    if word.endswith("'"):
        return singular(word[:-1]) + "'s"
    if word in _KEPT_ENDINGS or word.endswith(_IN_IE):
        return word
    for plural, one in _IRREGULAR.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + one
    for pattern, replacement in _ENDINGS:
        if pattern.search(word):
            return pattern.sub(replacement, word)
    return word
