"""Pictures of what tokens look at: what is drawn is where it was looked at."""

import numpy as np

from navit_jax import foreground, look_pictures, pictures
from navit_jax.foreground import Look

RNG = np.random.default_rng(0)
# Wide, and tall.
IMAGES = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((20, 40), (30, 15))]
LOOKS = [Look(RNG.random((3, 9, 4)), RNG.random((3, 9, 6, 2))) for _ in IMAGES]


def panels_of(figure):
    """[picture][stage]"""
    return np.reshape([a for a in figure.axes if a.images][: 2 * 3], (2, 3))


def test_boxes_and_points_are_drawn_at_their_place_and_tokens_keep_their_colours():
    drawn = panels_of(look_pictures.draw_looks(IMAGES, LOOKS))
    colours = pictures.COLOURS[: look_pictures.TOKENS]
    for row, image, look in zip(drawn, IMAGES, LOOKS, strict=True):
        height, width = image.shape[:2]
        for stage, axes in enumerate(row):
            assert axes.get_aspect() == 1  # a pixel is square
            assert axes.images[0].get_extent() == [0, width, height, 0]
            every, *of_tokens = axes.lines
            points = look.points[stage].reshape(-1, 2) * (width, height)
            np.testing.assert_allclose(every.get_xydata(), points)
            tokens = (0, 2, 4, 6, 8)
            boxes = zip(tokens, colours, axes.patches, of_tokens, strict=True)
            for token, colour, box, dots in boxes:
                x0, y0, x1, y1 = look.rois[stage, token]
                corners = box.get_bbox().get_points() / (width, height)
                np.testing.assert_allclose(corners, [(x0, y0), (x1, y1)])
                own = look.points[stage, token] * (width, height)
                np.testing.assert_allclose(dots.get_xydata(), own)
                assert dots.get_color() == colour
                assert is_colour(box.get_edgecolor(), colour)


def is_colour(given, colour):
    from matplotlib.colors import to_rgba

    return given == to_rgba(colour)


def test_densities_are_of_each_picture_and_of_all_together():
    figure = look_pictures.draw_density(IMAGES, LOOKS, LOOKS * 2)
    shown = [a for a in figure.axes if a.images]
    assert len(shown) == (2 + 1) * 3
    for row, look, cut in zip(
        panels_of(figure), LOOKS, ((18, 36), (36, 18)), strict=True
    ):
        for axes, points in zip(row, look.points, strict=True):
            expected = foreground.density(points, cut, look_pictures.RADIUS)
            np.testing.assert_allclose(axes.images[-1].get_array(), expected)
    for stage, axes in enumerate(shown[-3:]):
        points = np.concatenate([look.points[stage] for look in LOOKS * 2])
        expected = foreground.density(points, (36, 36), look_pictures.RADIUS)
        np.testing.assert_allclose(axes.images[0].get_array(), expected)
        assert axes.get_title() == ""
    assert [axes.get_title() for axes in shown[:3]] == [f"stage {i}" for i in (1, 2, 3)]
