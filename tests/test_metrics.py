"""What the bridge counts, and its text: read by a strict parser of the format, and by Prometheus' own."""

import importlib
import math
import re

import pytest

from dvai_bridge import (
    METRIC_SERIES_LIMIT,
    BridgeMetrics,
    CounterVector,
    HistogramVector,
    MetricFamily,
    MetricSample,
    MetricType,
    RequestSample,
    build_gauge,
    encode_metrics,
    format_metric_value,
)
from tests.support import require, start_bridge, wait_for

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def unescape(text):
    return re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text)


def parse_exposition(data):
    """{family: (type, {(sample name, labels): value})}; asserts every rule of the text format 0.0.4 that we know."""
    text = data.decode("utf-8")
    assert not text or text.endswith("\n")
    families, helped, current = {}, set(), None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert re.fullmatch(NAME, name) and name not in helped
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current in helped and current not in families and kind in SUFFIXES
            families[current] = (kind, {})
        else:
            found = SAMPLE.fullmatch(line)
            assert found and current, line
            kind, samples = families[current]
            assert found[1].removeprefix(current) in SUFFIXES[kind], line
            pairs = re.findall(r'([a-zA-Z0-9_]+)="((?:[^"\\]|\\.)*)"', found[2] or "")
            labels = tuple((name, unescape(value)) for name, value in pairs)
            assert len({name for name, _ in labels}) == len(labels) and (found[1], labels) not in samples
            samples[found[1], labels] = float(found[3].replace("Inf", "inf"))
    for name, (kind, samples) in families.items():
        if kind == "histogram":
            verify_histogram(name, samples)
        elif kind == "counter":
            assert name.endswith("_total") and all(value >= 0 for value in samples.values())
    return families


def verify_histogram(name, samples):
    """Buckets ascend, are cumulative and end with +Inf, which is the count."""
    series = {labels for sample, labels in samples if sample == f"{name}_count"}
    for labels in series:
        buckets = [
            (float(dict(each)["le"].replace("Inf", "inf")), value)
            for (sample, each), value in samples.items()
            if sample == f"{name}_bucket" and each[:-1] == labels and each[-1][0] == "le"
        ]
        bounds, counts = zip(*buckets, strict=True)
        assert list(bounds) == sorted(set(bounds)) and list(counts) == sorted(counts)
        assert bounds[-1] == math.inf and counts[-1] == samples[f"{name}_count", labels]
        assert (f"{name}_sum", labels) in samples
    assert {each[:-1] for sample, each in samples if sample == f"{name}_bucket"} == series


def build_busy_metrics():
    metrics = BridgeMetrics()
    metrics.record(
        RequestSample(
            path="/chat/completions",
            status=200,
            outcome="ok",
            route="local",
            prompt_tokens=7,
            completion_tokens=20,
            first_token_s=0.2,
            decode_tok_per_s=33.0,
        )
    )
    metrics.record(RequestSample(path="/embeddings", status=429, outcome="queue_full"))
    metrics.note_attempt("lan", "committed")
    return metrics


def test_the_text_of_a_small_registry():
    counter = CounterVector("x_total", 'Two\nlines, a \\ and a "quote".', ("a",))
    counter.add('q"b\\n\nx')
    counter.add("y", amount=2.5)
    gauge = build_gauge("g", "A gauge.", [((), -1.0), ((("le", "x"),), math.inf)])
    assert encode_metrics([counter.build_family(), gauge]) == (
        b'# HELP x_total Two\\nlines, a \\\\ and a "quote".\n# TYPE x_total counter\n'
        b'x_total{a="q\\"b\\\\n\\nx"} 1\nx_total{a="y"} 2.5\n'
        b'# HELP g A gauge.\n# TYPE g gauge\ng -1\ng{le="x"} +Inf\n'
    )
    assert parse_exposition(encode_metrics([counter.build_family()]))["x_total"][1] == {
        ("x_total", (("a", 'q"b\\n\nx'),)): 1,
        ("x_total", (("a", "y"),)): 2.5,
    }
    assert encode_metrics([]) == b""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.0, "3"), (0.1, "0.1"), (1e21, "1e+21"), (math.nan, "NaN"), (-math.inf, "-Inf"), (1e-9, "1e-09")],
)
def test_numbers(value, text):
    assert format_metric_value(value) == text


@pytest.mark.parametrize("name", ["", "1x", "a-b", "a b", 'a"', "ä"])
def test_names_that_the_format_does_not_have_are_refused(name):
    sample = MetricSample(value=1, labels=((name, "x"),))
    for family in (
        MetricFamily(name=name, type=MetricType.GAUGE, help="", samples=()),
        MetricFamily(name="x", type=MetricType.GAUGE, help="", samples=(sample,)),
    ):
        with pytest.raises(ValueError, match="no name"):
            encode_metrics([family])


def test_a_histogram_counts_each_value_where_it_belongs():
    histogram = HistogramVector("h", "H.", ("route",), (1.0, 2.5))
    for value in (0.5, 1.0, 1.1, 2.5, 2.6, 100.0):
        histogram.observe("r", value=value)
    _, samples = parse_exposition(encode_metrics([histogram.build_family()]))["h"]
    route = (("route", "r"),)
    assert samples == {
        ("h_bucket", (*route, ("le", "1"))): 2,
        ("h_bucket", (*route, ("le", "2.5"))): 4,
        ("h_bucket", (*route, ("le", "+Inf"))): 6,
        ("h_sum", route): pytest.approx(107.7),
        ("h_count", route): 6,
    }


def test_words_from_outside_fill_no_memory():
    counter = CounterVector("x_total", "X.", ("word", "other"))
    for n in range(10 * METRIC_SERIES_LIMIT):
        counter.add(f"word {n}", "same")
    _, samples = parse_exposition(encode_metrics([counter.build_family()]))["x_total"]
    assert len(samples) == METRIC_SERIES_LIMIT + 1
    assert samples["x_total", (("word", "other"), ("other", "other"))] == 9 * METRIC_SERIES_LIMIT
    with pytest.raises(ValueError, match="labels"):
        counter.add("one")


def test_what_a_bridge_counts():
    families = parse_exposition(encode_metrics(build_busy_metrics().build_families()))
    requests = families["dvai_requests_total"][1]
    assert {tuple(value for _, value in labels): count for (_, labels), count in requests.items()} == {
        ("/chat/completions", "local", "200", "ok"): 1,
        ("/embeddings", "none", "429", "queue_full"): 1,
    }
    local = (("route", "local"),)
    assert families["dvai_prompt_tokens_total"][1]["dvai_prompt_tokens_total", local] == 7
    assert families["dvai_completion_tokens_total"][1]["dvai_completion_tokens_total", local] == 20
    kind, first = families["dvai_time_to_first_token_seconds"]
    assert kind == "histogram" and first["dvai_time_to_first_token_seconds_sum", local] == 0.2
    assert families["dvai_decode_tokens_per_second"][1]["dvai_decode_tokens_per_second_count", local] == 1
    offload = (("route", "lan"), ("outcome", "committed"))
    assert families["dvai_offloads_total"][1] == {("dvai_offloads_total", offload): 1}


def test_a_bridge_of_its_own_model_counts(tmp_path):
    body = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "stream": True}
    with start_bridge(tmp_path, "--metrics") as bridge:
        assert bridge.request("POST", "/v1/chat/completions", body)[0] == 200
        assert bridge.request("POST", "/v1/completions", {"prompt": 5})[0] == 400

        def read():
            return parse_exposition(bridge.request("GET", "/metrics")[2])

        wait_for(lambda: sum(read()["dvai_requests_total"][1].values()) == 2, 20, "both are counted")
        families = read()
        ok = (("path", "/chat/completions"), ("route", "local"), ("status", "200"), ("outcome", "ok"))
        assert families["dvai_requests_total"][1]["dvai_requests_total", ok] == 1
        local = (("route", "local"),)
        assert families["dvai_completion_tokens_total"][1]["dvai_completion_tokens_total", local] > 0
        assert families["dvai_prompt_tokens_total"][1]["dvai_prompt_tokens_total", local] > 0
        assert families["dvai_time_to_first_token_seconds"][1]["dvai_time_to_first_token_seconds_count", local] == 1
        assert families["dvai_decode_tokens_per_second"][1]["dvai_decode_tokens_per_second_sum", local] > 0
        assert families["dvai_uptime_seconds"][1]["dvai_uptime_seconds", ()] > 0
        assert {sample for sample, _ in families["dvai_peers"][1]} == {"dvai_peers"}


def test_prometheus_reads_it():
    parser = require("prometheus_client") and importlib.import_module("prometheus_client.parser")
    text = encode_metrics(build_busy_metrics().build_families()).decode()
    read = {family.name: family for family in parser.text_string_to_metric_families(text)}
    ours = parse_exposition(text.encode())
    assert {name.removesuffix("_total") for name in ours} == set(read)
    for name, (kind, samples) in ours.items():
        theirs = read[name.removesuffix("_total")]
        assert theirs.type == kind
        assert {(s.name, tuple(sorted(s.labels.items()))): s.value for s in theirs.samples} == {
            (sample, tuple(sorted(labels))): value for (sample, labels), value in samples.items()
        }
