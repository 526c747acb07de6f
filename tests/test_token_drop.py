import numpy as np
import pytest
from scipy import stats

from navit_jax import config
from navit_jax.data import resolution, token_drop
from navit_jax.errors import ConfigError

M = 20_000
U = (np.arange(M) + 0.5) / M
TOKENS = np.full(M, 100)
SEEN = np.zeros(M, np.int64)


def law(**section):
    return config.build(section, token_drop.LAWS, "data.token_drop")


@pytest.mark.parametrize(
    "maximum, mean, percent",
    [
        (0.4, 0.10, 60.3),
        (0.4, 0.25, 11.5),
        (0.4, 0.35, 1.3),
        (0.7, 0.10, 66.9),
        (0.7, 0.25, 27.3),
        (0.7, 0.50, 2.3),
        (0.7, 0.65, 0.1),
        (0.9, 0.10, 70.4),
        (0.9, 0.25, 33.5),
        (0.9, 0.50, 5.9),
        (0.9, 0.70, 0.9),
        (0.9, 0.85, 0.1),
    ],
)
def test_beta_drops_less_than_a_tenth_as_often_as_in_figure_15a(maximum, mean, percent):
    rates = law(name="beta", mean=mean, maximum=maximum)(U, TOKENS, SEEN)
    # The figure prints one decimal, from samples: 0.6 points is their own spread.
    assert abs(100 * (rates < 0.1).mean() - percent) < 0.6


@pytest.mark.parametrize("mean, maximum", [(0.5, 0.9), (0.1, 0.4), (0.85, 0.9)])
def test_beta_has_the_quantiles_of_the_beta_law(mean, maximum):
    rates = law(name="beta", mean=mean, maximum=maximum)(U, TOKENS, SEEN)
    m = mean / maximum
    a, b = m * 7 / 3, (1 - m) * 7 / 3
    # 2,048 straight pieces, the law is steepest in the first and the last.
    np.testing.assert_allclose(rates / maximum, stats.beta(a, b).ppf(U), atol=2e-3)
    assert abs(rates.mean() - mean) < 1e-4
    assert abs((rates / maximum).var() - 0.3 * m * (1 - m)) < 1e-3


@pytest.mark.parametrize("mean", [0.0, 0.9])
def test_beta_at_the_end_of_its_range_is_constant(mean):
    rates = law(name="beta", mean=mean, maximum=0.9)(U, TOKENS, SEEN)
    np.testing.assert_allclose(rates, mean)


def test_rates_by_resolution_are_normal_within_two_sigma_about_a_line_in_tokens():
    section = {"name": "by_resolution", "minimum": 0.1, "maximum": 0.9}
    section |= {"tokens_low": 16, "tokens_high": 576}
    drop = law(**section)
    for tokens, centre in [(16, 0.1), (296, 0.5), (576, 0.9), (4, 0.1), (999, 0.9)]:
        rates = drop(U, np.full(M, tokens), SEEN)
        expected = stats.truncnorm(-2, 2, loc=centre, scale=0.02).ppf(U)
        np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_rates_stay_rates():
    section = {
        "minimum": 0.0,
        "maximum": 1.0,
        "tokens_low": 1,
        "tokens_high": 9,
        "sigma": 0.3,
    }
    rates = law(name="by_resolution", **section)(U, np.arange(M) % 12, SEEN)
    assert rates.min() == 0
    assert rates.max() == 1


def rho(n, start, end, total, middle, width):
    return start + (end - start) / (1 + np.exp(-(n - middle * total) / (width * total)))


@pytest.mark.parametrize(
    "start, end, middle, width",
    [(0.2, 0.8, 1 / 2, 1 / 10), (0.8, 0.2, 1 / 2, 1 / 10), (0.8, 0.2, 2 / 3, 1 / 5)],
    ids=["increasing", "decreasing fast", "decreasing slow"],
)
def test_a_schedule_moves_the_mean_of_every_law(start, end, middle, width):
    schedule = {
        "start": start,
        "end": end,
        "total": 1000,
        "middle": middle,
        "width": width,
    }
    for n in (0, 300, 500, 666, 1000):
        expected = rho(n, start, end, 1000, middle, width)
        seen = np.full(M, n)
        constant = law(name="constant", schedule=schedule)
        np.testing.assert_allclose(constant(U, TOKENS, seen), expected)
        beta = law(name="beta", maximum=0.9, schedule=schedule)(U, TOKENS, seen)
        assert abs(beta.mean() - expected) < 1e-4
        sized = law(
            name="by_resolution",
            minimum=0.4,
            maximum=0.6,
            tokens_low=50,
            tokens_high=150,
            sigma=0.01,
            schedule=schedule,
        )
        assert abs(sized(U, TOKENS, seen).mean() - expected) < 1e-4
        for drop in (constant, sized):
            np.testing.assert_allclose(drop.average(np.array([n])), expected)


def test_a_scheduled_rate_does_not_depend_on_who_is_drawn_beside():
    schedule = {"start": 0.8, "end": 0.2, "total": M}
    drop = law(name="beta", mean=0.5, maximum=0.9, schedule=schedule)
    together = drop(U, TOKENS, np.arange(M))
    for i in (0, 777, 10_000, M - 1):
        alone = drop(U[i : i + 1], TOKENS[:1], np.array([i]))
        assert alone[0] == together[i]


def test_none_keeps_all_and_no_rate_drops_the_last_token():
    assert not law(name="none")(U, TOKENS, SEEN).any()
    grids = np.array([[1, 1], [3, 5], [40, 40]])
    rates = np.array([0.999, 0.999, 1.0])
    assert resolution.kept_tokens(grids, rates).tolist() == [1, 1, 1]
    assert resolution.kept_tokens(grids, np.zeros(3)).tolist() == [1, 15, 1600]
    assert resolution.kept_tokens(grids, np.full(3, 0.4)).tolist() == [1, 9, 960]


@pytest.mark.parametrize(
    "section, message",
    [
        ({"name": "constant", "rate": 1.5}, "token_drop.rate=1.5"),
        (
            {"name": "beta", "mean": 0.95, "maximum": 0.9},
            r"mean=0.95: needs .* \[0, 0.9\]",
        ),
        ({"name": "beta", "maximum": 0}, "maximum=0"),
        (
            {"name": "beta", "schedule": {"start": 0.99, "end": 0.2, "total": 9}},
            "schedule.start=0.99",
        ),
        (
            {"name": "constant", "schedule": {"start": 0.2, "end": 0.8}},
            "data.token_drop.schedule.total is missing",
        ),
        (
            {
                "name": "constant",
                "schedule": {"start": 0.2, "end": 0.8, "total": 9, "mid": 1},
            },
            "data.token_drop.schedule.mid is unknown; did you mean 'middle'",
        ),
        (
            {"name": "constant", "schedule": {"start": 0.2, "end": 0.8, "total": 0}},
            "total=0",
        ),
        (
            {
                "name": "by_resolution",
                "minimum": 0,
                "maximum": 1,
                "tokens_low": 9,
                "tokens_high": 9,
            },
            "tokens_low < tokens_high",
        ),
    ],
)
def test_a_wrong_law_names_the_field(section, message):
    with pytest.raises(ConfigError, match=message):
        law(**section)
