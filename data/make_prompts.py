#!/usr/bin/env python
"""Write `data/prompts/general.txt`, 2,000 captions of ordinary images for a prior of all that a base model knows.

    python data/make_prompts.py data/prompts/general.txt

The captions combine subjects, places, media and light, from the lists below. Each subject of a kind appears about
equally often. Equal seeds give equal files.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the root of the checkout

from ldm.cli.run import run
from ldm.files import atomic_write

COUNT, SEED = 2000, 17

# Per kind: subjects, and the places that all of them can be in.
KINDS: dict[str, tuple[str, str]] = {
    "animals": (
        """a cat; a black kitten; a dog; a sleeping puppy; a horse; a brown cow; a flock of sheep; a goat; a pig; a
        rabbit; a hamster; a mouse; a squirrel; a hedgehog; a fox; a wolf; a bear; a panda; a lion; a tiger; a
        leopard; an elephant; a giraffe; a zebra; a monkey; a kangaroo; a deer; a moose; a camel; a raccoon; an
        otter; a badger""",
        """in tall grass; on a dirt road; near a wooden fence; in the snow; under a tree; beside a pond; on a hill;
        in a clearing; at the edge of a forest; in a field of flowers""",
    ),
    "birds and sea animals": (
        """an owl; an eagle; a parrot; a duck; a swan; a heron; a crow; a sparrow; a penguin; a flamingo; a
        peacock; a rooster; a turtle; a frog; a crab; a seal""",
        """on a rock; near the water; on wet sand; in the rain; among reeds; on a wooden pier; in the morning mist;
        in front of a blue sky""",
    ),
    "under water": (
        """a dolphin; a whale; a shark; an octopus; a jellyfish; a seahorse; a shoal of small fish; a stingray; a
        sea turtle""",
        """above a coral reef; in deep blue water; over white sand; near the surface; in green water; beside a
        shipwreck""",
    ),
    "insects": (
        """a butterfly; a bee; a ladybird; a dragonfly; a beetle; an ant; a spider; a snail; a caterpillar; a
        grasshopper""",
        "on a leaf; on a yellow flower; on tree bark; on a blade of grass; on a stone; on a red petal",
    ),
    "people": (
        """an old man with a beard; a young woman; a boy with a hat; a girl in a red coat; a fisherman; a farmer; a
        nurse; a carpenter; a musician with a violin; a dancer; a cook; a teacher; a cyclist; a hiker; a street
        vendor; a mother with a baby; two friends; a family; a crowd of people; an astronaut; a firefighter; a
        gardener; a runner; a couple; an old woman with glasses; a child with a balloon""",
        """in a park; on a busy street; at a market; in front of a brick wall; on a beach; at a train station; in a
        garden; by a window; on a bridge; in a quiet village; at a bus stop; in the snow""",
    ),
    "buildings": (
        """a castle; a small church; a lighthouse; a wooden barn; a skyscraper; a stone cottage; a temple; a
        mosque; a windmill; a factory; a library; a railway station; a row of townhouses; a stone bridge; a
        farmhouse; a glass tower; a ruined abbey; a log cabin; a greenhouse; a theatre; an observatory; a fire
        station""",
        """beside a river; on a hill; at the end of a road; in the mountains; in the fog; behind tall trees; under
        dark clouds; in winter; by the sea; in the middle of a field""",
    ),
    "landscapes": (
        """a mountain lake; a waterfall; a desert with dunes; a pine forest; a rocky coast; a wide valley; a
        glacier; rolling hills; a river in a canyon; a tropical beach; a meadow; a bamboo grove; a volcano; a
        frozen lake; rice terraces; a swamp; an island; a vineyard; a field of lavender; a country road; a city
        skyline; a harbour""",
        """at sunrise; at sunset; under a full moon; after the rain; in autumn; in spring; in winter; under a
        stormy sky; on a clear day; in thick fog; seen from above; at night with stars""",
    ),
    "food": (
        """a bowl of soup; a loaf of bread; a pizza; a plate of pasta; a slice of chocolate cake; a fruit salad;
        sushi; a hamburger; a cup of coffee; a glass of orange juice; pancakes with berries; a cheese board; a
        pot of curry; roasted vegetables; a bowl of rice; an apple pie; an ice cream cone; a boiled egg; a
        sandwich; a pot of tea""",
        """on a wooden table; on a white plate; on a picnic blanket; in a kitchen; on a marble counter; in a small
        café; on a blue tablecloth; beside a window""",
    ),
    "fruit and vegetables": (
        """red apples; a bunch of grapes; lemons; a cut watermelon; bananas; strawberries; carrots; tomatoes; a
        pumpkin; peppers; mushrooms; a head of cabbage; pears; an onion; corn; aubergines""",
        "in a basket; in a bowl; on a market stall; on a cutting board; in a wooden crate; on a dark cloth",
    ),
    "vehicles": (
        """a red bicycle; an old car; a yellow taxi; a bus; a steam train; a motorcycle; a truck; a tractor; a
        tram; a van; a sports car; a scooter; a police car; an ambulance; a caravan; a fire engine""",
        """on a wet road; in a narrow street; in front of a garage; in a tunnel; at a crossing; on a country road;
        in the snow; in a car park; at night; under a bridge""",
    ),
    "ships and aircraft": (
        """a sailing boat; a cargo ship; a rowing boat; a ferry; a submarine; a canoe; a hot-air balloon; a small
        plane; an airliner; a helicopter; a glider; a rocket""",
        """at dawn; under heavy clouds; in bright sunlight; in the distance; above the coast; in the evening; in a
        storm""",
    ),
    "plants": (
        """a sunflower; a red rose; tulips; an oak tree; a cactus; a fern; a bonsai; a palm tree; cherry blossoms;
        a potted plant; a water lily; an orchid; ivy; a birch; poppies; a maple tree; lavender; an olive tree""",
        """in a garden; beside a path; against a white wall; in the rain; in morning light; by a window; in a
        greenhouse""",
    ),
    "things": (
        """a wooden chair; a lamp; a clock; a vase; a teapot; a pair of boots; an umbrella; a stack of books; a
        guitar; a piano; a camera; a typewriter; a telescope; a globe; a candle; a key; a suitcase; a toy robot;
        a teddy bear; a chessboard; a mirror; a basket; a hammer; a bottle; a hat; glasses; a backpack; a radio;
        an old telephone; a sewing machine; a violin; a drum; a football; a kite; a lantern; an hourglass""",
        """on a table; on a wooden floor; on a shelf; in an attic; on a desk; in a shop window; on a white
        background; on a grey background; in a workshop; on the grass""",
    ),
    "rooms": (
        """a living room; a kitchen; a bedroom; a bathroom; an office; a reading room; a classroom; a workshop; a
        restaurant; a hotel lobby; a museum hall; an attic; a laboratory; a bookshop; a bakery; a gym; a
        stairwell; a cinema""",
        """with large windows; with white walls; with a wooden floor; full of plants; in warm light; at night; with
        high ceilings; with old furniture; with nobody in it""",
    ),
    "imagined": (
        """a dragon; a robot; a wizard; a floating city; a spaceship; a unicorn; a giant tree; a knight in armour;
        a mermaid; a haunted house; an alien plant; a clockwork bird; a castle in the clouds; a ghost""",
        """in a dark forest; on a distant planet; above the clouds; in a cave; in a ruined city; on a cliff; in the
        mist""",
    ),
    "patterns": (
        """blue and white tiles; a woven carpet; wallpaper with leaves; a mosaic of coloured glass; stacked logs;
        cracked earth; ripples in sand; a brick wall; rusty metal; folded paper; marble; knitted wool; roof
        tiles; a wire fence""",
        "seen from close; in soft light; from above; in bright sunlight; in warm colours; in pale colours",
    ),
}
MEDIA = (
    *["a photo of {}"] * 6,
    *("a black-and-white photo of {}", "a close-up photo of {}", "a wide shot of {}", "an old photograph of {}"),
    *("an oil painting of {}", "a watercolour of {}", "a pencil drawing of {}", "a charcoal sketch of {}"),
    *("an ink drawing of {}", "a cartoon of {}", "a children's book illustration of {}", "a woodcut of {}"),
    *(
        "a digital painting of {}",
        "a 3D render of {}",
        "a pixel art image of {}",
        "a poster of {}",
        "an engraving of {}",
    ),
    *("a pastel drawing of {}", "a stained glass window of {}", "an embroidery of {}", "{}", "{}", "{}"),
)
GREY = ("black-and-white", "old photograph", "pencil", "charcoal", "ink", "woodcut", "engraving")  # without colours
COLOURS = (", bright colours", ", muted colours", ", pale colours", ", warm colours")
ENDINGS = (
    *[""] * 6,
    *(", soft light", ", high contrast", ", shallow depth of field", ", backlit", ", minimalist", ", highly detailed"),
    *(", grainy", ", dramatic shadows", ", centred", ", symmetrical composition", ", simple shapes"),
    *COLOURS,
)


def listed(text: str) -> list[str]:
    """Return the entries of `text` between semicolons, on one line each."""
    return [" ".join(entry.split()) for entry in text.split(";")]


def captions(count: int = COUNT, seed: int = SEED) -> list[str]:
    """Return `count` different captions."""
    generator = random.Random(seed)
    every = [(subject, listed(places)) for subjects, places in KINDS.values() for subject in listed(subjects)]
    found: dict[str, None] = {}  # in order
    while len(found) < count:
        generator.shuffle(every)
        for subject, places in every:
            medium, ending = generator.choice(MEDIA), generator.choice(ENDINGS)
            if ending in COLOURS and any(grey in medium for grey in GREY):
                ending = ""
            found[medium.format(f"{subject} {generator.choice(places)}") + ending] = None
    return list(found)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write, one caption per line")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.out) as path:
        path.write_text("".join(f"{caption}\n" for caption in captions()), encoding="utf-8")


if __name__ == "__main__":
    run(main)
