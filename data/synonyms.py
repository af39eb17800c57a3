"""Words that can replace one another in a caption and leave it true.

A table, written for captions by hand: it knows which words mean the same in one ("a monitor" is a screen, "a screen" need
not be a monitor).

A word keeps its part of speech, number and tense. Colours, counts, positions and directions are never replaced, as
captions are scored on them.
"""

import itertools
import re
from collections import defaultdict

# A line is a group whose words replace each other; "a > b c" allows only b or c for a, the narrower or clearer word.
NOUNS = """
    photo photograph snapshot
    picture image
    couch sofa
    rug carpet
    drape > curtain
    armchair > chair
    television tv
    monitor > screen
    refrigerator fridge
    stovetop cooktop
    countertop > counter
    cabinet cupboard
    sink > basin
    faucet > tap
    mug > cup
    plate > dish
    skillet > pan
    bathroom restroom washroom
    phone telephone
    cellphone smartphone > phone
    airplane plane
    airplane plane > aircraft
    car automobile
    taxi > cab
    bicycle > bike
    motorcycle motorbike
    railroad railway
    subway metro
    highway freeway
    path trail
    walkway > path
    street road
    shop store
    restaurant > eatery
    house > home
    theater theatre
    gym gymnasium
    cemetery graveyard
    patio terrace
    rooftop > roof
    sea ocean
    seashore > shore
    creek stream
    meadow > field
    pasture > field
    rock > stone
    man > guy fellow
    woman lady
    gentleman > man
    child kid youngster
    baby infant
    toddler > child
    teenager teen adolescent
    mother mom
    father dad
    grandmother grandma
    grandfather grandpa
    friend > pal buddy
    person > individual
    spectator onlooker
    cyclist bicyclist
    skateboarder > skater
    batter > hitter
    policeman > cop officer
    fisherman > angler
    physician > doctor
    chef > cook
    puppy pup
    kitten kitty
    rabbit bunny
    insect bug
    backpack rucksack knapsack
    handbag purse
    sneaker > shoe
    jacket > coat
    costume > outfit
    fabric > cloth
    carton > box
    packet > package
    beverage > drink
    doughnut donut
    hamburger burger
    vegetable veggie
    yogurt yoghurt
    supper > dinner
    medicine medication
    pill > tablet
    gift > present
    logo > emblem
    sketch > drawing
    statue > sculpture
    racket racquet
    frisbee > disc
    group > bunch
    stack > pile
    heap > pile
    chunk > piece
    variety assortment
    trick > stunt
    contest competition
    parade > procession
    background > backdrop
"""
# Only the forms of verbs in -s, -ing and -ed: "walk" alone is as often a noun.
VERBS = """
    grasp clutch grip > hold
    lug haul tote > carry
    throw > toss
    hurl fling > throw
    hit > strike
    drag tug tow > pull
    shove > push
    hoist > lift
    lift > raise
    observe > watch
    examine inspect
    depict portray
    surround encircle
    decorate adorn
    attach > fasten
    chase > pursue
    pursue > chase
    hug embrace
    sniff > smell
    sip > drink
    gnaw > chew
    consume devour > eat
    purchase buy
    attempt try
    repair fix
    assist > help
    utilize > use
    collect > gather
    stack > pile
"""
# Verbs that have these synonyms where no object follows: "walking down a road", and not "walking a dog".
VERBS_WITHOUT_OBJECT = """
    walk stroll
    wander roam
    hike trek
    jog sprint > run
    jump leap
    look > gaze
    stare gaze
    peek peer
    talk speak chat
    smile grin
    giggle chuckle > laugh
    weep sob > cry
    yell shout
    relax > rest
    sleep doze snooze nap
    lay > lie
    crouch squat
    tumble > fall
    twirl > spin
    dangle > hang
    soar > fly
    hover > float
    clamber > climb
    dine > eat
    gather congregate
    clap > applaud
    romp > play
"""
# Taken literally: no other form of them is replaced.
OTHERS = """
    big large
    small little
    tiny > small little
    huge enormous gigantic
    beautiful lovely gorgeous
    cute adorable
    happy cheerful joyful
    sad unhappy
    modern contemporary
    cloudy > overcast
    foggy misty
    soaked drenched
    dirty > grimy grubby
    messy untidy
    busy > bustling
    peaceful tranquil serene
    strange weird odd
    funny > amusing comical
    silly goofy
    tasty delicious yummy
    wide > broad
    skinny slim slender
    chubby plump
    circular > round
    shiny glossy
    furry fuzzy
    sleepy drowsy
    tired weary
    quick > rapid
    various > different
    assorted > various
    entire > whole
    costly expensive
    rusty rusted
    antique vintage
    blurry blurred
    rocky > stony
    wooded forested
    deserted abandoned
    cozy > comfortable
    fashionable stylish trendy
    seated > sitting
    middle > center
    eyeglasses spectacles
    trousers > pants
    trash garbage
    luggage baggage
    clothing apparel
    ketchup catsup
    icing frosting
    money > cash
    stomach belly
    kind sort > type
    type > kind sort
    people > folks
    quickly rapidly swiftly
    maybe perhaps possibly
    almost nearly
    partially partly
    mostly mainly
    completely totally entirely
    happily cheerfully joyfully
    displaying > showing
    sketching > drawing
    skateboarding > skating
    slicing chopping > cutting
    petting > stroking
    washing > cleaning
    placing > putting
    constructing > building
    closing shutting
    begins > starts
"""
# Here a word of the table is part of a name for something else.
PHRASES = """
    hot dog, train car, cable car, car seat, rail car, subway car, passenger car, box car, race car, street light,
    street car, dirt road, road bike, dirt bike, home plate, name plate, license plate, number plate, house cat,
    house plant, opera house, green house, dog house, bird house, rock climbing, rock climber, rock band, rock star,
    rock concert, sea lion, sea gull, sea food, sea shell, beach ball, life jacket, book jacket, group photo,
    group picture, group shot, little league, little bit, a little, happy birthday, middle school, middle aged, middle age,
    wide open, wide eyed, wide mouthed, air plane, ski lift, chair lift, file cabinet, filing cabinet, washing machine, petting zoo, trying on,
    tries on, taxi cab, baby carrot, baby sitter, cell phone, smart phone, mobile phone, phone book, picture frame,
    picture book, gift card, gift shop, gift bag, gift box, gift wrap, card trick, metro station, snow man, smoke stack,
    first lady, water rapid, flower child, white house, fire house, full house, blood type, whole wheat, big top, big rig, looks like
"""
COLOURS = (
    "beige black blond blonde blue bronze brown brunette colorful coloured colored crimson cyan gold golden gray green "
    "grey indigo ivory khaki lavender lime magenta maroon mauve mustard navy olive orange peach pink purple red rose "
    "ruby scarlet silver tan teal turquoise violet white yellow"
)
COUNTS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million first second third "
    "fourth fifth last single double triple twin half quarter once twice both pair pairs couple couples dozen dozens few "
    "several many much more most less least lot lots all none every each any some no another other"
)
PLACES = (
    "left leftmost leftward right rightmost rightward lefthand righthand above below over under up down top bottom upper "
    "lower front back behind ahead before after inside outside in out north south east west northern southern eastern "
    "western high low forward backward clockwise horizontal vertical near far"
)
FUNCTION_WORDS = (
    "a about across against along also am among an and are as at away be because been being but by can could did do does "
    "during else etc for from had has have he her here him his how i if into is it its itself just like may me might "
    "must my not of off on onto or our shall she should so such than that the their them then there these they this "
    "those through to too toward towards under until us very was we were what when where which while who whom whose "
    "will with within without would you your something anything nothing everything someone somebody anyone everyone"
)
KEPT = frozenset(f"{COLOURS} {COUNTS} {PLACES} {FUNCTION_WORDS}".split())  # never replaced, nor put in
# What follows a verb that has no object.
PREPOSITIONS = (
    "about above across after against along alongside among and around as at away before behind below beneath beside "
    "between by down during from in inside into near next off on onto out outside over past through together toward "
    "towards under underneath up upon when while with within"
)
# Verbs whose past is not in -ed; theirs is left alone.
IRREGULAR = "buy cling draw drink eat fall feed fling fly hang hit hold lay leap lie run sleep smell speak spin strike throw weep"


def synonyms(word: str, follower: str | None = None) -> tuple[str, ...]:
    """What can replace a lower-case word in a caption: words of the same part of speech, number and tense.

    Args:
        follower: the next word of its sentence, None at the end. Verbs that may have an object ("walking a dog") are
            replaced only where none follows.
    """
    return TABLE.get(word, ()) if word not in WITHOUT_OBJECT or follower in FOLLOWERS else ()


def _pairs(lines: str):
    """(word, synonym) of each line of a table."""
    for line in lines.strip().splitlines():
        words, _, others = line.partition(">")
        pairs = itertools.product(words.split(), others.split() or words.split())
        yield from ((word, other) for word, other in pairs if word != other)


# How words end -> the same in another form; the first that fits.
CONSONANT_DOUBLES = r"^((?:qu|[^aeiou])*[aeiou]([bdgkmnpt]))$"
PLURAL = {
    r"man$": "men", r"^child$": "children", r"^person$": "people", r"^aircraft$": "aircraft", r"(s|x|z|ch|sh)$": r"\1es",
    r"([^aeiou])y$": r"\1ies", r"$": "s",
}  # fmt: skip
SAME = {r"$": ""}
ING = {CONSONANT_DOUBLES: r"\1\2ing", r"ie$": "ying", r"e$": "ing", r"$": "ing"}
ED = {CONSONANT_DOUBLES: r"\1\2ed", r"e$": "ed", r"([^aeiou])y$": r"\1ied", r"$": "ed"}


def inflected(word: str, endings: dict[str, str]) -> str:
    """A noun in the plural or a verb in -s (PLURAL), a verb in -ing or -ed: "hug", ING -> "hugging"; "try", ED -> "tried"."""
    ending = next(ending for ending in endings if re.search(ending, word))
    return re.sub(ending, endings[ending], word, count=1)


def _table() -> dict[str, tuple[str, ...]]:
    """{form: (form, ...)} of every form of the words above."""
    others_of: dict[str, dict] = defaultdict(dict)
    irregular = set(IRREGULAR.split())
    verbs = [*_pairs(VERBS), *_pairs(VERBS_WITHOUT_OBJECT)]
    regular = [pair for pair in verbs if not irregular.intersection(pair)]
    for pairs, endings in (
        (_pairs(NOUNS), SAME), (_pairs(NOUNS), PLURAL), (verbs, PLURAL), (verbs, ING), (regular, ED), (_pairs(OTHERS), SAME),
    ):  # fmt: skip
        for word, other in pairs:
            others_of[inflected(word, endings)][inflected(other, endings)] = None
    return {form: tuple(others) for form, others in others_of.items()}


TABLE = _table()
FOLLOWERS = frozenset([None, *PREPOSITIONS.split()])
WITHOUT_OBJECT = frozenset(
    form
    for verb, _ in _pairs(VERBS_WITHOUT_OBJECT)
    for form in (inflected(verb, PLURAL), inflected(verb, ING), inflected(verb, ED))
)
