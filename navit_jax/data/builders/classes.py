"""The label sets of the embedded set, and the labels of a picture by its folders."""

# Top-level folders that are kinds of things.
CLASSES8 = (
    "animals",
    "buildings",
    "food",
    "people",
    "plants",
    "recreation",
    "tools",
    "transportation",
)
# Second-level folders with at least 25 pictures of their own.
CLASSES34 = (
    "animals/birds",
    "animals/bugs",
    "animals/mammals",
    "buildings/homes",
    "computer/buttons",
    "computer/hardware",
    "food/beverages",
    "food/breads_and_carbs",
    "food/desserts",
    "food/fruit",
    "food/meats_and_eggs",
    "people/bodypart",
    "people/clothing",
    "people/smilies",
    "people/stickmen",
    "plants/flowers",
    "recreation/games",
    "recreation/holiday",
    "recreation/music",
    "recreation/party",
    "recreation/sports",
    "recreation/toys",
    "shapes/arrows",
    "shapes/callouts",
    "shapes/flowchart",
    "shapes/jigsaw",
    "signs_and_symbols/flags",
    "signs_and_symbols/led",
    "signs_and_symbols/map_symbols",
    "signs_and_symbols/weather",
    "tools/weapons",
    "transportation/boating",
    "transportation/roadsigns",
    "transportation/vehicles",
)


def labels_of(categories: tuple[str, ...], classes: tuple[str, ...]) -> list[int]:
    """The classes whose folder holds one of the categories, ascending."""
    return sorted(
        {i for i, name in enumerate(classes) for c in categories if _within(c, name)}
    )


def _within(category: str, name: str) -> bool:
    return category == name or category.startswith(name + "/")
