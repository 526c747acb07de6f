import re

import jaxtyping
import numpy as np
import pytest

from navit_jax import zero_shot
from navit_jax.errors import ConfigError


def test_every_name_stands_in_every_template():
    prompts = zero_shot.list_prompts(["cat", "dog {x}"], ["a {}", "{} {x}", "{}"])
    assert prompts[:3] == ["a cat", "cat {x}", "cat"]
    assert prompts[3:] == ["a dog {x}", "dog {x} {x}", "dog {x}"]


def test_a_class_is_the_normalised_mean_of_its_prompts():
    prompts = np.random.default_rng(0).standard_normal((6, 4))
    found = zero_shot.average_prompts(prompts, 2)
    for c in range(2):
        mean = sum(prompts[3 * c + i] for i in range(3)) / 3
        np.testing.assert_allclose(found[c], mean / np.sqrt((mean**2).sum()))
    # Prompts that cancel out are a class that nothing is near to.
    opposite = zero_shot.average_prompts(np.array([[1.0, 0], [-1, 0]]), 1)
    np.testing.assert_array_equal(opposite, [[0, 0]])


@pytest.mark.parametrize(
    "names, templates, message",
    [
        ("cat", ["{}"], "classes='cat': give a list"),
        ([], ["{}"], r"classes=\[\]: give a list"),
        (["cat", 3], ["{}"], "classes=.*: give a list"),
        (["cat", "dog", "Cat "], ["{}"], r"\['cat', 'Cat '\] are alike"),
        (["cat"], "a {}", "templates='a {}': give a list"),
        (["cat"], ["{}", "a cat"], "'a cat' has not one place"),
        (["cat"], ["{} and {}"], "'{} and {}' has not one place"),
    ],
)
def test_names_and_templates_that_do_not_fit_are_named(
    names, templates, message, monkeypatch
):
    # Without the types that the tests check at every call.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=message):
        zero_shot.list_prompts(names, templates)


def test_a_class_is_called_by_the_end_of_its_path():
    assert zero_shot.call_class("food/breads_and_carbs") == "breads and carbs"
    assert zero_shot.call_class("tench") == "tench"


def test_a_name_is_absent_if_no_caption_holds_its_words_in_a_row():
    names = ["cat", "guinea pig", "pig", "Birds", "bread and", "sea-lion", "dog"]
    captions = ["A CAT\tand Guinea  pig.", "concat, bird; bread", "sea lion and", ""]
    expected = [
        not any(
            re.search(rf"(^|\W){re.escape(name.lower())}(\W|$)", text)
            for text in ("a cat and guinea pig.", "concat, bird; bread", "sea-lion and")
        )
        for name in names
    ]
    assert expected == [False, False, False, True, True, False, True]
    assert zero_shot.find_absent(names, captions).tolist() == expected
