"""What Prometheus gets of the guard, and what it does with it: rules, and a dashboard."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from overt.guard import supervisor
from overt.guard.meter import BOUNDS, Meter

from .ground import SOURCE, Ground, wait_until

exporter = pytest.importorskip("overt.guard.exporter", reason="not installed: prometheus-client (the extra `metrics`)")
metrics = pytest.importorskip("overt.guard.metrics")
prometheus_client = pytest.importorskip("prometheus_client")

DEPLOY = SOURCE.parent / "deploy"
WORDS = [sys.executable, "-m", "overt", "guard", "metrics"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}


def promtool(*words: str, given: str = "") -> None:
    """Run it; it has to be content."""
    if shutil.which("promtool") is None:
        pytest.skip("not installed: prometheus (tools/debian-packages daemons)")
    done = subprocess.run(
        ["promtool", *words], input=given, capture_output=True, text=True, timeout=60, check=False,
        cwd=DEPLOY / "prometheus",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def values(text: str) -> dict[str, float]:
    """Each series, and its value."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {series: float(value) for series, _, value in lines}


def test_the_meter_puts_each_call_into_its_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter()
    for slot, seconds in enumerate((0.0001, 0.0002, 40.0)):
        now[0] = 0.0
        meter.begin(slot, 1)
        now[0] = seconds
        meter.end(slot)
    meter.end(7)  # given up by a worker that did not begin it
    latency = meter.describe()["latency"]
    assert latency["calls"] == [2, 1, *[0] * (len(BOUNDS) - 2), 1]
    assert latency["seconds"] == pytest.approx(40.0003)


def test_the_meter_knows_how_long_the_oldest_call_of_each_listener_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    meter = Meter()
    for slot, listener in enumerate((1, 1, 2)):
        now[0] = float(slot)
        meter.begin(slot, listener)
    now[0] = 10.0
    assert meter.longest() == {1: 10.0, 2: 8.0}
    meter.end(0)
    meter.end(2)
    assert meter.longest() == {1: 9.0}


def test_a_guard_that_does_not_run_is_a_metric(tmp_path: Path) -> None:
    assert values(exporter.text(tmp_path / "guard")) == {"overt_guard_up": 0.0}


@pytest.mark.root
def test_an_error_is_counted_by_upper_and_by_container(guarded: Ground) -> None:
    assert guarded.guard is not None
    one, other = guarded.container(), guarded.container("runc")
    one.lose()
    assert [one.new_syncfs(), one.new_syncfs()] == [5, 0]
    text = exporter.text(guarded.guard.socket)
    promtool("check", "metrics", given=text)
    found = values(text)
    expected = {
        "overt_guard_up": 1, "overt_guard_workers_total": 1, "overt_guard_calls_answered_total": 2,
        "overt_guard_errors_total": 1, "overt_guard_told_total": 1, "overt_guard_crashes_total": 0,
        "overt_guard_containers": 2, "overt_guard_listeners": 2,
        "overt_guard_call_duration_seconds_count": 2, 'overt_guard_call_duration_seconds_bucket{le="+Inf"}': 2,
    }  # fmt: skip
    for container, told in ((one, 1), (other, 0)):
        labels = f'{{container_id="{container.id}",upperdir="{container.upper}"}}'
        expected |= {f"overt_guard_overlay_errors{labels}": 1, f"overt_guard_overlay_told{labels}": told}
        expected |= {f"overt_guard_overlay_guarded{labels}": 1, f"overt_guard_overlay_untold{labels}": 1 - told}
        expected[f'overt_guard_oldest_call_seconds{{container_id="{container.id}"}}'] = 0
    assert {series: found.get(series) for series in expected} == expected
    assert 0 < found["overt_guard_call_duration_seconds_sum"] < 10
    (device,) = [series for series in found if series.startswith("overt_guard_upper_errors")]
    assert found[device] == 1
    names = set(re.findall(r"overt_guard_\w+", text))
    assert used() - names == set()
    guarded.guard.kill_worker()

    def is_back() -> bool:
        assert guarded.guard is not None
        found.clear()
        found.update(values(exporter.text(guarded.guard.socket)))
        overlays = sum(series.startswith("overt_guard_overlay_errors") for series in found)
        return found.get("overt_guard_workers_total") == overlays == 2

    wait_until(is_back, "the next worker knows both")
    untold = {series for series, value in found.items() if series.startswith("overt_guard_overlay_untold") and value}
    assert untold == {f'overt_guard_overlay_untold{{container_id="{other.id}",upperdir="{other.upper}"}}'}
    assert found[device] == 1 and found["overt_guard_errors_total"] == 0  # on record, and counted by the one that died


@pytest.mark.root
def test_an_error_that_was_others_is_not_counted(bare: Ground) -> None:
    bare.start_guard("--blame", "owner")
    assert bare.guard is not None
    victim, other = bare.container(), bare.container("runc")
    victim.lose()
    assert [other.new_syncfs(), victim.new_syncfs()] == [0, 5]
    status = bare.guard.status
    wait_until(lambda: not any(each["waiting"] for each in status()["containers"]), "what was told is on record")
    bare.guard.kill_worker()
    found: dict[str, float] = {}

    def is_back() -> bool:
        assert bare.guard is not None
        found.update(values(exporter.text(bare.guard.socket)))
        return sum(series.startswith("overt_guard_overlay_errors") for series in found) == 2

    wait_until(is_back, "the next worker knows both")
    for container, errors in ((victim, 1), (other, 0)):
        labels = f'{{container_id="{container.id}",upperdir="{container.upper}"}}'
        assert found[f"overt_guard_overlay_errors{labels}"] == errors
        assert found[f"overt_guard_overlay_untold{labels}"] == 0


def overlay(upperdir: str, *ids: str, **changes: int | bool) -> dict[str, Any]:
    """An overlay as the status has it."""
    well = {"guarded": True, "errors": 0, "told": 0, "untold": False, "owed": 0}
    return {"upperdir": upperdir, "ids": list(ids), **well, **changes}


def shown(overlays: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], float]]:
    """Each metric of these overlays by container and upperdir; none is there twice."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for family in metrics._overlays(overlays):
        assert len({str(sample.labels) for sample in family.samples}) == len(family.samples)
        by_labels = {(each.labels["container_id"], each.labels["upperdir"]): each.value for each in family.samples}
        found[family.name.removeprefix("overt_guard_overlay_")] = by_labels
    return found


def test_whatever_name_a_container_gives_an_upper_it_can_be_told() -> None:
    names = [b"/u\xff", b"/u\n2", "/\u00fc".encode(), b"/u\xff"]
    found = shown([overlay(os.fsdecode(name), "c", told=1) for name in names])
    assert found["told"] == {("c", "/u\\xff"): 2, ("c", "/u\\n2"): 1, ("c", "/\u00fc"): 1}
    registry = prometheus_client.CollectorRegistry()
    registry.register(Fixed(list(metrics._overlays([overlay("/u\udcff", "c\ud800")]))))
    assert b"/u\\\\xff" in prometheus_client.generate_latest(registry)


class Fixed(prometheus_client.registry.Collector):
    """Metrics that are there already."""

    def __init__(self, families: list[Any]) -> None:
        self.collect = lambda: families  # type: ignore[method-assign]


def test_a_container_with_many_overlays_is_told_of_in_a_few_series() -> None:
    many = [overlay(f"/u{number}", "many", "other") for number in range(1000)]
    many[-1] |= {"errors": 2, "untold": True, "guarded": False}
    found = shown([*many, overlay("/u", "few", errors=1)])
    assert len(found["errors"]) == 2 * (metrics._MOST_UPPERS + 1) + 1
    assert ("many", "/u0") in found["errors"] and found["errors"]["few", "/u"] == 1
    rest = "many", metrics._OTHERS
    assert [found[key][rest] for key in ("errors", "untold", "guarded")] == [2, 1, 0]
    assert found["guarded"]["many", "/u0"] == 1


@pytest.mark.timeout(60)
def test_a_guard_that_hangs_is_a_metric_before_prometheus_gives_up(tmp_path: Path) -> None:
    (sockets := [supervisor.listen(supervisor.status_path(tmp_path / "guard"))])[0].settimeout(1)
    began = time.monotonic()
    try:
        assert values(exporter.text(tmp_path / "guard")) == {"overt_guard_up": 0.0}
    finally:
        sockets[0].close()
    assert 4 < time.monotonic() - began < 9


def dashboard() -> dict[str, Any]:
    return dict(json.loads((DEPLOY / "grafana/overt-guard.json").read_text()))


def used() -> set[str]:
    """The metrics that rules and dashboard speak of."""
    rules = (DEPLOY / "prometheus/overt-guard.rules.yml").read_text()
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return set(re.findall(r"overt_guard_\w+", " ".join([rules, *shown])))


def test_prometheus_takes_the_rules_and_they_fire_when_they_should() -> None:
    promtool("check", "rules", "overt-guard.rules.yml")
    promtool("test", "rules", "overt-guard.test.yml")
    promtool("check", "config", "prometheus.yml")


def test_the_unit_answers_where_prometheus_asks() -> None:
    unit = (SOURCE.parent / "systemd/overt-guard-metrics.service").read_text()
    (port,) = re.findall(r"--listen [\d.]+:(\d+)$", unit, re.MULTILINE)
    assert f"localhost:{port}" in (DEPLOY / "prometheus/prometheus.yml").read_text()


def test_each_rule_is_tested() -> None:
    names = re.findall(r"- alert: (\w+)", (DEPLOY / "prometheus/overt-guard.rules.yml").read_text())
    tests = (DEPLOY / "prometheus/overt-guard.test.yml").read_text()
    for how in ("alertname: {}\n        exp_alerts:\n", r"alertname: {}, exp_alerts: \[\]}}"):
        assert [name for name in names if not re.search(how.format(name), tests)] == []


def test_prometheus_takes_the_dashboards_expressions(tmp_path: Path) -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    for variable in ("$__rate_interval", "$__range"):
        expressions = [each.replace(variable, "5m") for each in expressions]
    rules = [{"record": f"shown:{number}", "expr": each} for number, each in enumerate(expressions)]
    path = tmp_path / "rules.json"  # YAML has JSON in it
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


@pytest.mark.parametrize(
    ("given", "asked"), [("127.0.0.1", ["127.0.0.1"]), ("[::1]", ["[::1]"]), ("", ["127.0.0.1", "[::1]"])]
)
def test_it_answers_http(tmp_path: Path, given: str, asked: list[str]) -> None:
    if "[::1]" in asked and not Path("/proc/net/if_inet6").exists():
        pytest.skip("the machine has no IPv6")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*WORDS, "--socket", str(tmp_path / "guard"), "--listen", f"{given}:{port}"]
    process = subprocess.Popen(words, env=ENVIRONMENT)

    def answer(host: str) -> str:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as page:
                return str(page.read().decode())
        except OSError:
            return ""

    try:
        wait_until(lambda: all("overt_guard_up 0.0" in answer(host) for host in asked), "an answer")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_it_writes_a_file_and_takes_it_away(tmp_path: Path) -> None:
    path = tmp_path / "overt.prom"
    process = subprocess.Popen([*WORDS, "--socket", str(tmp_path / "guard"), "--textfile", str(path)], env=ENVIRONMENT)
    try:
        wait_until(path.exists, "a file")
        assert values(path.read_text()) == {"overt_guard_up": 0.0}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not path.exists()


def refused(*words: str) -> tuple[int, str]:
    """Exit status, and the one line that it said."""
    done = subprocess.run([*WORDS, *words], capture_output=True, text=True, timeout=30, check=False, env=ENVIRONMENT)
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize("content", ["# HELP node_x A file of somebody else's.\n", ""])
def test_a_file_that_is_not_the_guards_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.prom"
    path.write_text(content)
    code, words = refused("--socket", str(tmp_path / "guard"), "--textfile", str(path))
    assert code == 1 and "holds no metrics of a guard" in words and str(path) in words
    assert path.read_text() == content
    (tmp_path / "link").symlink_to("nowhere")
    assert refused("--textfile", str(tmp_path / "link"))[0] == 1
    assert sorted(os.listdir(tmp_path)) == ["link", "other.prom"]


def test_a_file_that_one_before_it_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "overt.prom"
    path.write_text(exporter.text(tmp_path / "guard") + "old 1\n")
    process = subprocess.Popen([*WORDS, "--socket", str(tmp_path / "guard"), "--textfile", str(path)], env=ENVIRONMENT)
    try:
        wait_until(lambda: "old" not in path.read_text(), "a new one")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_what_cannot_be_done_is_named_with_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "x.prom"
    assert refused("--textfile", str(missing)) == (
        1,
        f"overt: cannot be written, No such file or directory: {missing}\n",
    )
    code, words = refused("--listen", "nohost.invalid:9")
    assert code == 1 and "(name another HOST:PORT): nohost.invalid:9" in words
    code, words = refused("--listen", ":9467", "--textfile", str(missing))
    assert code == 2 and "--listen or --textfile, and not both" in words
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, words = refused("--listen", address)
    assert code == 1 and "Address already in use" in words and address in words


@pytest.mark.parametrize("address", ["here", "localhost:0", "1.2.3.4:http"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    program = "import sys; sys.modules['prometheus_client'] = None; from overt.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *WORDS[3:], "--listen", address],
        capture_output=True, text=True, timeout=30, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"no address and port: {address}" in done.stderr and done.stderr.count("\n") == 1
