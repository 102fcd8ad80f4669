"""The arithmetic of `make load`: from events, records and scrapes to numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loadtests.load import asking, cells, engine, pictures, settings, summary
from loadtests.load.cells import Cell, Load
from loadtests.load.engine import Between, Restarted, Scrape
from loadtests.load.records import (
    CANCELLED,
    CUT,
    IN_STREAM,
    LOST,
    NO_REPORT,
    OK,
    SLOW,
    TIMEOUT,
    UNREADABLE,
    Record,
)  # fmt: skip
from loadtests.load.running import Run
from tests.load_records import ASKING, cell, record

# Words on the command line


@pytest.mark.parametrize(
    ("text", "value"), [("500ms", 0.5), ("20s", 20), ("2min", 120), ("1.5", 1.5)]
)
def test_durations(text, value):
    assert cells.seconds(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (cells.seconds, "5h"), (cells.seconds, "-1s"), (cells.share, "120%"), (cells.share, "x"),
        (cells.span, "0"), (cells.span, "9-3"), (cells.plan, "0"), (cells.plan, "1.5"),
        (cells.plan, "most"), (cells.plan, "true"), (cells.stages, "20s"),
        (cells.stages, "20s:0"), (pictures.sizes, "640"), (pictures.sizes, "8x8"),
        (pictures.sizes, "64x64:0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_came(parse, text):
    with pytest.raises(ValueError, match="got '"):
        parse(text)


def test_budgets_are_plans():
    assert cells.plan("full") == {"ratio": 1.0}
    assert cells.plan("64") == {"tokens": 64}
    assert cells.plan("0.25") == {"ratio": 0.25}
    assert cells.plan('{"tokens": 8, "method": "random"}') == {"tokens": 8, "method": "random"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rates", "2", "--concurrency", "1"], "give one of"),
        (["--concurrency", "1", "--processes", "2"], "at least --processes"),
        (["--rates", "0"], "above 0"),
        (["--slo-ttft-p99", "fast"], "500ms"),
        (["--rates", "nan"], "above 0"),
        (["--pictures", "-3"], "--pictures must be at least 1"),
        (["--compare", "nowhere.json"], "--compare must be an earlier results.json, nowhere.json"),
        (["--compare", "pyproject.toml"], "pyproject.toml is something else"),
        (["--compare", ".github/workflows"], "Is a directory"),
        (["--budgets", "some"], "got 'some'"),
        (["--duration", "0.5"], "at least 1s"),
        (["--cancel", "60%", "--slow", "60%"], "all requests together"),
    ],
)
def test_wrong_command_lines_are_refused_before_anything_starts(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        settings.arguments(words)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_a_cell_survives_its_file(tmp_path):
    one = replace(cell("64", cells.stages("20s:2,10s:8")), asking=replace(ASKING, answer=(8, 16)))
    one.write(tmp_path / "cell.json")
    assert Cell.read(tmp_path / "cell.json") == one


def test_every_second_round_runs_backwards():
    loads = [Load("closed", 1), Load("closed", 4)]
    order = cells.sweep(["full", "64"], loads, 2)
    assert order[:4] == [(b, load) for load in loads for b in ("full", "64")]
    assert order[4:] == order[3::-1]


# Pictures and requests


def test_no_two_pictures_are_the_same_and_the_same_seed_makes_the_same():
    small = pictures.sizes("64x48:3,48x64")
    source = pictures.Source("photos", small, seed=7)
    urls = [url for url, _ in zip(source.different(), range(300), strict=False)]
    assert len(set(urls)) == 300
    assert urls[123] == pictures.Source("photos", small, seed=7).url(123)
    assert urls[123] != pictures.Source("photos", small, seed=8).url(123)
    shapes = [source.picture(number).size for number in range(300)]
    assert 0.65 < shapes.count((64, 48)) / 300 < 0.85
    assert set(shapes) == {(64, 48), (48, 64)}


def test_a_folder_of_pictures_is_a_source(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    source = pictures.Source(str(tmp_path), pictures.sizes("32x32"))
    assert source.picture(3).size == (32, 32)
    assert np.std(np.asarray(source.picture(3))) > 10
    (tmp_path / "one.png").unlink()
    with pytest.raises(ValueError, match="folder with pictures"):
        pictures.Source(str(tmp_path), pictures.sizes("32x32"))


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "half.jpg").write_bytes(b"no picture")
    source = pictures.Source(str(tmp_path), pictures.sizes("32x32"))
    with pytest.raises(ValueError, match=r"half.jpg, which cannot be read"):
        source.picture(0)


def test_a_folder_with_nothing_to_vary_is_refused(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    source = pictures.Source(str(tmp_path), pictures.sizes("32x32"))
    with pytest.raises(ValueError, match="too few or too small"):
        list(zip(source.different(), range(2), strict=False))


def test_the_pool_gives_back_what_was_put_in(tmp_path):
    source = pictures.Source("photos", pictures.sizes("32x32"))
    heard = []
    pool = pictures.Pool.fill(tmp_path / "pool.txt", source, 5, heard.append)
    assert heard == [1, 2, 3, 4, 5]
    assert [pool[i] for i in range(len(pool))] == [source.url(i) for i in range(5)]


@given(st.integers(0, 10_000), st.integers(1, 50), st.integers(0, 50))
def test_lengths_stay_within_their_limits_and_repeat(number, low, more):
    asked = replace(ASKING, answer=(low, low + more), question=(low, low + more))
    length = asking.answer_length(asked, number)
    assert low <= length <= low + more
    assert length == asking.answer_length(asked, number)
    assert low <= len(asking.question(asked, number).split()) <= low + more


def test_a_request_asks_for_a_stream_of_exactly_so_many_tokens():
    body = asking.body(replace(ASKING, answer=(9, 9)), {"tokens": 4}, "data:x", 3, identity="id")
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (9, 9, True)
    assert body["stream"] is True
    assert body["hiprune"] == {"tokens": 4}
    assert body["messages"][0]["content"][0]["uuid"] == "id"
    natural = asking.body(replace(ASKING, exact=False), {}, "data:x", 3)
    assert "ignore_eos" not in natural
    assert "uuid" not in natural["messages"][0]["content"][0]


def streamed(*events):
    """A record of a stream of these events."""
    lines = [e if isinstance(e, bytes) else b"data: " + json.dumps(e).encode() for e in events]
    rest = iter([part for line in lines for part in (line + b"\n", b"\n")])
    one = Record(0, 0.0)
    asking.stream(lambda _end: next(rest, b""), one)
    return one


ROLE = {
    "choices": [{"delta": {"role": "assistant", "content": ""}}],
    "hiprune": {
        "images": [
            {"tokens_full": 576, "tokens_kept": 64},
            {"tokens_full": 100, "tokens_kept": 10},
        ]
    },
}
TOKEN = {"choices": [{"delta": {"content": "x"}}]}
END = b"data: [DONE]"


def test_a_stream_is_read_to_its_end():
    usage = {
        "choices": [],
        "usage": {"prompt_tokens": 80, "completion_tokens": 3,
                  "prompt_tokens_details": {"cached_tokens": 16}},
        "metrics": {"queue_time_ms": 5, "time_to_first_token_ms": 250, "generation_time_ms": 90},
    }  # fmt: skip
    silent = {"choices": [{"delta": {"content": ""}}]}
    one = streamed(ROLE, TOKEN, silent, TOKEN, b": a comment", usage, END)
    assert one.outcome == OK
    assert (one.full, one.kept) == (676, 74)
    assert len(one.gaps) == 2
    assert (one.prompt, one.answer, one.cached) == (80, 3, 16)
    assert (one.queue, one.prefill, one.decode) == (0.005, 0.25, 0.09)


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ((ROLE, TOKEN), CUT),
        ((ROLE, TOKEN, {"error": {"message": "no"}}), IN_STREAM),
        ((ROLE, b"data: {nothing"), UNREADABLE),
        ((ROLE, b"data: [1]"), UNREADABLE),
        ((ROLE, END), UNREADABLE),
        (({"choices": [{"delta": {"content": "x"}}]}, END), NO_REPORT),
    ],
)
def test_what_goes_wrong_in_a_stream_has_a_kind(events, outcome):
    assert streamed(*events).outcome == outcome


# Rows


def test_a_row_shows_the_numbers_of_its_records():
    records = [record(i / 10, ttft=i / 100, gaps=[0.01, 0.03], prefill=0.2, answer=3,
                      seconds=0.5) for i in range(1, 101)]  # fmt: skip
    records += [record(5, outcome=LOST), record(5, outcome=LOST), record(5, outcome="HTTP 503")]
    records += [record(5, outcome=CANCELLED), record(5, outcome=SLOW)]
    row = summary.row([Run(cell("64"), records, 0.0, 10.0)], {"ttft": 0.25}, 10**6)
    ttft = [i / 100 for i in range(1, 101)]
    for which in (50, 90, 99):
        assert row[f"ttft_p{which}"] == pytest.approx(np.percentile(ttft, which))
    assert row["itl_p50"] == pytest.approx(0.02)
    assert row["itl_p99"] == pytest.approx(0.03)
    assert row["e2e_p90"] == pytest.approx(0.5)
    assert row["prefill_p50"] == 0.2
    assert row["queue_p50"] is None
    assert (row["requests"], row["rps"], row["tokens_per_second"]) == (100, 10, 30)
    assert row["goodput"] == pytest.approx(2.5)
    assert row["errors"] == {"HTTP 503": 1, LOST: 2}
    assert row["error_rate"] == pytest.approx(3 / 105)
    assert (row["cancelled"], row["slow"]) == (1, 1)
    assert (row["tokens_kept"], row["tokens_full"]) == (64, 576)


def test_gains_are_against_the_full_budget_under_the_same_load():
    def run(budget, users, ttft):
        ended = [record(i, ttft=ttft) for i in range(1, 6)]
        return Run(cell(budget, Load("closed", users)), ended, 0.0, 5.0)

    rows = summary.rows(
        [run("full", 1, 1.0), run("64", 1, 0.5), run("64", 4, 0.5), run("64", 1, 0.5)], {}, 100
    )
    assert [(row["budget"], row["load"], row["gain_ttft"]) for row in rows] == [
        ("full", "1", 1.0), ("64", "1", 2.0), ("64", "4", None),
    ]  # fmt: skip
    assert rows[1]["rounds"] == 2
    assert rows[1]["requests"] == 10


def test_a_row_without_records_has_no_numbers_and_does_not_fail():
    row = summary.row([Run(cell(), [], 0.0, 5.0)], {"ttft": 1.0}, 10)
    assert row["ttft_p50"] is row["error_rate"] is row["tokens_kept"] is None
    assert row["rps"] == 0


def test_the_load_generator_says_when_it_is_the_bottleneck():
    def told(cpu, lag, ttft=0.5, number=0):
        run = Run(cell(), [record(1, ttft=ttft)], 0.0, 5.0)
        run.records[0].picture = number
        run.health = {"1": [{"at": 1, "cpu": cpu, "lags": [lag] * 50, "waiting": 1.0, "open": []}]}
        return summary.row([run], {}, 10)["bottleneck"]

    assert told(0.5, 0.02) == ""
    assert "95% of a core" in told(0.95, 0.0)
    assert "60 ms late" in told(0.5, 0.06)
    assert told(0.5, 0.009, ttft=0.01) == ""
    # One long halt a second: few wake-ups are late, but half of all moments are.
    held = Run(cell(), [record(1)], 0.0, 5.0)
    held.health = {
        "1": [{"at": 1, "cpu": 0.1, "lags": [*[0.0] * 25, 0.5], "waiting": 1.0, "open": []}]
    }
    assert "late (p99)" in summary.row([held], {}, 10)["bottleneck"]
    assert "1 pictures had to be made" in told(0.5, 0.0, number=10)


def test_a_machine_that_is_busy_with_other_work_is_named():
    def crowded(waiting):
        run = Run(cell(), [record(1)], 0.0, 5.0)
        run.health = {"1": [{"at": 1, "cpu": 0.1, "lags": [0.0], "waiting": waiting, "open": []}]}
        return summary.row([run], {}, 10)["crowded"]

    assert crowded(7.0)
    assert not crowded(2.0)


def test_answers_that_arrive_in_one_piece_are_told_from_fast_ones():
    def held_back(gaps, decode=None, engine_decode=None, times=5):
        records = [record(1, gaps=list(gaps), decode=decode) for _ in range(times)]
        return summary.held_back(records, engine_decode)

    at_once, one_by_one = [0.0, 1e-5, 2e-5, 0.0], [0.02, 0.03, 0.02, 0.02]
    assert held_back(at_once, decode=0.1)
    assert held_back(at_once, engine_decode=0.1)
    assert held_back(at_once)  # nobody tells how long it took, but nothing is so fast
    assert not held_back(one_by_one, decode=0.09)
    assert not held_back(one_by_one)
    assert not held_back([0.001] * 4, decode=0.004)  # a fast server
    assert not held_back([0.0, 0.05, 0.0, 0.05], decode=0.1)  # two tokens an event
    assert not held_back([0.0, 0.0], decode=0.1)  # too short to tell
    assert not summary.held_back([], None)


# The engine's view

TEXT = """
# TYPE vllm:request_prefill_time_seconds histogram
vllm:request_prefill_time_seconds_bucket{{engine="0",le="0.3"}} {a}
vllm:request_prefill_time_seconds_bucket{{engine="0",le="0.5"}} {b}
vllm:request_prefill_time_seconds_bucket{{engine="0",le="+Inf"}} {b}
vllm:request_prefill_time_seconds_count{{engine="0"}} {b}
vllm:request_prefill_time_seconds_sum{{engine="0"}} {seconds}
vllm:request_prefill_time_seconds_count{{engine="1"}} {b}
vllm:request_prefill_time_seconds_sum{{engine="1"}} {seconds}
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_count{{engine="0"}} {b}
vllm:request_queue_time_seconds_sum{{engine="0"}} 1
# TYPE vllm:request_decode_time_seconds histogram
vllm:request_decode_time_seconds_count{{engine="0"}} {b}
vllm:request_decode_time_seconds_sum{{engine="0"}} {seconds}
# TYPE hiprune_encoder_seconds histogram
hiprune_encoder_seconds_count {b}
hiprune_encoder_seconds_sum {encoder}
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total {b}00
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total {hits}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0"}} 2
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16"}} 1
"""


def scrape(a, b, seconds, encoder=0.0, hits=0):
    return Scrape.parse(TEXT.format(a=a, b=b, seconds=seconds, encoder=encoder, hits=hits))


def test_the_engines_view_is_what_was_added_between_two_scrapes():
    between = Between(scrape(10, 10, 2.0, 1.0), scrape(10, 30, 10.0, 5.0, 50))
    found = between.histogram(engine.PHASES["prefill"])
    assert (found.count, found.total, found.mean) == (40, 16.0, 0.4)  # two engines
    assert found.buckets[0.5] == 20
    assert between.encoder_seconds() == pytest.approx(4.0)
    assert between.hit_rate("prefix") == pytest.approx(50 / 2000)
    assert between.hit_rate("pictures") is None
    assert scrape(1, 1, 1).under_way == 2
    assert scrape(1, 1, 1).info == {"block_size": "16"}


def test_a_quantile_of_a_histogram_is_a_bucket():
    found = engine.Histogram(100, 0.0, {0.3: 50, 0.5: 90, float("inf"): 100})
    assert found.quantile(0.5) == (0.0, 0.3)
    assert found.quantile(0.9) == (0.3, 0.5)
    assert found.quantile(0.99) == (0.5, float("inf"))
    assert engine.Histogram(0, 0.0, {}).quantile(0.5) is None


def test_a_restarted_server_has_no_engine_view():
    with pytest.raises(Restarted):
        Between(scrape(10, 10, 2.0), scrape(1, 1, 0.1))
    run = Run(
        cell(), [record(1)], 0.0, 5.0, {}, scrape(9, 9, 1), scrape(10, 10, 2), scrape(1, 1, 1)
    )
    row = summary.row([run], {}, 10)
    assert row["engine_prefill"] is None
    assert "restarted" in row["trouble"]


def test_the_time_of_a_request_is_split_without_rest():
    run = Run(cell(), [record(1, seconds=2.0)], 0.0, 5.0, {},
              scrape(0, 0, 0.0), scrape(0, 0, 0.0), scrape(5, 5, 2.5, 1.0))  # fmt: skip
    row = summary.row([run], {}, 10)
    assert row["engine_prefill"] == 0.5
    assert row["engine_decode"] == 0.5
    assert row["outside_mean"] == pytest.approx(2.0 - 0.5 - 0.5 - row["engine_queue"])


def test_pictures_of_requests_that_were_broken_off_share_the_encoders_time():
    ours = [record(1, seconds=2.0) for _ in range(10)]
    ours += [record(1, outcome=outcome) for outcome in (CANCELLED, CANCELLED, TIMEOUT)]
    run = Run(cell(), ours, 0.0, 5.0, {}, scrape(0, 0, 0), scrape(0, 0, 0), scrape(5, 5, 2.5, 1.3))
    row = summary.row([run], {}, 10)
    assert row["engine_encoder"] == pytest.approx(1.3 / 13)
    assert row["trouble"] == ""


def test_other_clients_of_the_engine_are_named():
    def trouble(requests, busy=False):
        run = Run(cell(), [record(1)] * 4, 0.0, 5.0, {}, *[scrape(0, 0, 0)] * 2)
        run.after, run.busy = scrape(1, requests / 2, 1), busy
        return summary.row([run], {}, 10)["trouble"]

    assert trouble(6) == ""
    assert "others used the server too (20 requests ended in the engine, 4" in trouble(20)
    assert "others" in trouble(4, busy=True)


def test_requests_that_wait_in_vain_are_failures_though_their_time_is_not_up():
    run = Run(
        cell(load=Load("closed", 4)), [record(i, seconds=1.0) for i in range(1, 21)], 0.0, 20.0
    )
    one = {"cpu": 0.1, "lags": [0.0], "waiting": 1.0}
    run.health = {"1": [one | {"at": 1, "open": [-9.0]}, one | {"at": 20, "open": [-2.0, 19.5]}],
                  "2": [one | {"at": 20, "open": [-1.0, 15.0]}]}  # fmt: skip
    row = summary.row([run], {}, 100)
    assert row["unfinished"] == 4
    assert row["errors"] == {"no answer": 2}  # those that waited for the whole window
    assert row["error_rate"] == pytest.approx(2 / 22)
    slow = Run(cell(), [record(19, seconds=9.0)], 0.0, 20.0, run.health)
    assert summary.row([slow], {}, 100)["errors"] == {}  # where requests take long, they may


def test_goodput_is_not_told_where_its_metric_was_not_measured():
    run = Run(cell(), [record(1), record(2)], 0.0, 2.0)
    assert summary.row([run], {"prefill": 0.1}, 10)["goodput"] is None
    assert summary.row([run], {"ttft": 0.6, "itl": 0.1}, 10)["goodput"] == 1.0


def test_the_engines_mean_stands_in_where_prefill_is_not_told_for_each_request():
    runs = [
        Run(cell(budget), [record(1)], 0.0, 5.0, {}, *[scrape(0, 0, 0)] * 2, scrape(5, 5, seconds))
        for budget, seconds in (("full", 10.0), ("64", 2.5))
    ]
    assert [row["gain_prefill"] for row in summary.rows(runs, {}, 10)] == [1.0, 4.0]
