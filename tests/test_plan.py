import re

import commands
import numpy as np
import pytest
import tiny

from navit_jax import experiment, plan
from navit_jax.data.rows import Batches


@pytest.mark.parametrize("start, end", [(0.8, 0.2), (0.2, 0.8)])
@pytest.mark.parametrize(
    "total, steps", [(3_000, 50), (1_000, 50), (20_000, 50)],
    ids=["within", "long before its end", "beyond its end"],
)  # fmt: skip
def test_the_packing_report_says_what_scheduled_dropping_reaches(
    start, end, total, steps
):
    config = tiny.config(data__slots=24, data__window=200)
    schedule = {"start": start, "end": end, "total": total}
    config["data"]["token_drop"] = {"name": "constant", "schedule": schedule}
    stream = experiment.build_stream(config)
    # The truth: the images of all rows, one batch after the other.
    batches, seen = Batches(stream.plan), 0
    for k in range(steps):
        seen += sum(len(row.kept) for row in batches.rows(k))
    text = plan.packing_report(stream, steps)
    (printed,) = re.findall(r"([\d,]+) in [\d,]+ steps", text)
    assert int(printed.replace(",", "")) == pytest.approx(seen, rel=0.02)
    share = 1 / (1 + np.exp(-(seen / total - 0.5) / 0.1))
    (last,) = re.findall(r"first to last +[\d.]+ to ([\d.]+)", text)
    assert float(last) == pytest.approx(start + (end - start) * share, abs=0.02)


def test_a_picture_that_can_not_be_written_is_refused_before_anything_is_planned(
    tmp_path,
):
    (tmp_path / "file").write_text("")
    picture = f"--picture={tmp_path}/file/rows.png"
    config = "--config=configs/smoke.py"
    done = commands.run("navit_jax.plan", config, "--packing", picture)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{picture} can not be written" in done.stderr
