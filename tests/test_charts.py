import pytest

from navit_jax import charts


@pytest.fixture
def drawn(monkeypatch):
    """The axes of what is drawn, figure by figure."""
    figures = []
    monkeypatch.setattr(
        charts, "_svg", lambda figure: figures.append(figure.axes) or ""
    )
    return figures


def evaluation(name, value, tokens, metric="accuracy"):
    return {
        f"eval/{name}/{metric}": value,
        f"eval/{name}/{metric}_low": value - 0.1,
        f"eval/{name}/{metric}_high": value + 0.1,
        f"eval/{name}/tokens_per_image": tokens,
    }


def points(axes):
    """The points of each line that is no baseline."""
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    return [list(map(tuple, line.get_xydata().tolist())) for line in lines]


def dashed(axes):
    lines = [line for line in axes.lines if line.get_linestyle() == "--"]
    return sorted(line.get_ydata()[0] for line in lines)


def legend(axes):
    found = axes.get_legend()
    return found and [text.get_text() for text in found.get_texts()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_of_budgets_alone_the_chart_over_tokens_stands_alone_with_its_legend(drawn):
    values = evaluation("v_16tokens", 0.2, 15.5) | evaluation("v_49tokens", 0.5, 44.0)
    charts.draw_resolutions({"run": {**values, "baseline/v/majority/accuracy": 0.25}})
    ((left, right),) = drawn
    assert not left.axison
    assert not left.texts
    assert legend(left) is None
    assert right.axison
    assert legend(right) == ["v"]
    assert points(right) == [[(15.5, 0.2), (44.0, 0.5)]]
    assert dashed(right) == [0.25]
    assert texts(right) == ["v/majority"]
    # Without a chart on its left it needs numbers of its own.
    assert right.yaxis.get_tick_params()["labelleft"]
    assert right.get_ylabel().startswith("share")


def test_of_sides_without_a_count_of_tokens_the_chart_over_sides_stands_alone(drawn):
    charts.draw_resolutions({"run": evaluation("v_32", 0.2, None)})
    ((left, right),) = drawn
    assert legend(left) == ["v"]
    assert points(left) == [[(32, 0.2)]]
    assert not right.axison


def test_native_size_is_marked_and_on_no_line(drawn):
    values = evaluation("v_32", 0.2, 4.0) | evaluation("v_64", 0.5, 16.0)
    values |= evaluation("v_native", 0.4, 10.0)
    charts.draw_resolutions({"run": values})
    ((left, right),) = drawn
    assert points(left) == [[(32, 0.2), (64, 0.5)]]
    assert points(right) == [[(4.0, 0.2), (16.0, 0.5)], [(10.0, 0.4)]]
    assert texts(right) == ["native"]
    assert texts(left) == []
    assert legend(left) == ["v"]


def test_of_native_size_alone_there_is_its_point_with_a_legend(drawn):
    charts.draw_resolutions({"run": evaluation("v_native", 0.4, 10.0)})
    ((left, right),) = drawn
    assert not left.axison
    assert legend(right) == ["v"]
    assert points(right) == [[], [(10.0, 0.4)]]


def test_recall_stands_beside_accuracy_each_with_its_own_baselines(drawn):
    both = ("image_to_text_r5", 0.3), ("text_to_image_r5", 0.4)
    values = evaluation("kinds_96", 0.6, 36.0)
    for metric, value in both:
        values |= evaluation("pairs_96", value, 36.0, metric)
        values |= evaluation("pairs_64", value / 2, 16.0, metric)
        values[f"baseline/pairs/chance/{metric}"] = value / 100
        values[f"baseline/pairs/top_category/{metric}"] = value / 3
        values[f"baseline/pairs/top_category/{metric[:-1]}1"] = 0.9  # R@1
    charts.draw_resolutions({"run": values})
    (axes,) = drawn
    titles = [own.get_title(loc="left") for own in axes[::2]]
    assert titles == ["accuracy", "R@5, image to text", "R@5, text to image"]
    assert points(axes[0]) == [[(96, 0.6)]]
    assert dashed(axes[0]) == []
    for left, right, (_, value) in zip(axes[2::2], axes[3::2], both, strict=True):
        assert points(left) == [[(64, value / 2), (96, value)]]
        assert points(right) == [[(16, value / 2), (36, value)]]
        assert dashed(left) == dashed(right) == [value / 100, value / 3]
        assert texts(left) == ["pairs/chance", "pairs/top_category"]
        band = left.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((value / 2 - 0.1, value + 0.1))


@pytest.mark.parametrize(
    "names, titles",
    [
        (["train/accuracy", "pack/padding"], ["accuracy", "padding"]),
        (
            [
                "train/similarity",
                "eval/v_64/similarity",
                "eval/v_64/image_to_text_r5",
                "eval/v_64/text_to_image_r5",
                "eval/v_64/text_to_image_r1",
                "pack/padding",
                "pack/text_padding",
            ],
            ["recall at 5", "similarity", "padding", "padding of text"],
        ),
    ],
)
def test_the_curves_are_those_of_what_the_run_measured(drawn, names, titles):
    records = [{"step": step, **dict.fromkeys(names, step / 2)} for step in (1, 2)]
    charts.draw_curves({"run": records})
    (axes,) = drawn
    assert [own.get_title() for own in axes if own.axison] == titles
    assert sum(len(own.lines) for own in axes) == sum("_r1" not in n for n in names)


def test_nothing_is_drawn_of_nothing(drawn):
    assert charts.draw_curves({"run": [{"step": 1}]}) == ""
    assert charts.draw_resolutions({"run": {"eval/v_32/loss": 0.5}}) == ""
    assert drawn == []
