"""What Prometheus gets of the guard, and what it does with it: rules, and a dashboard."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from overt.guard.meter import BOUNDS, Meter

from .ground import SOURCE, Ground, wait_until

exporter = pytest.importorskip("overt.guard.exporter", reason="not installed: prometheus-client (the extra `metrics`)")

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
        meter.begin(slot)
        now[0] = seconds
        meter.end(slot)
    meter.end(7)  # given up by a worker that did not begin it
    latency = meter.describe()["latency"]
    assert latency["calls"] == [2, 1, *[0] * (len(BOUNDS) - 2), 1]
    assert latency["seconds"] == pytest.approx(40.0003)


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
        labels = f'{{container="{container.id}",upperdir="{container.upper}"}}'
        expected |= {f"overt_guard_overlay_errors{labels}": 1, f"overt_guard_overlay_told{labels}": told}
        expected[f"overt_guard_overlay_guarded{labels}"] = 1
    assert {series: found.get(series) for series in expected} == expected
    assert 0 < found["overt_guard_call_duration_seconds_sum"] < 10
    (device,) = [series for series in found if series.startswith("overt_guard_upper_errors")]
    assert found[device] == 1
    names = set(re.findall(r"overt_guard_\w+", text))
    assert used() - names == set()
    guarded.guard.kill_worker()
    wait_until(lambda: values(exporter.text(guarded.guard.socket)).get("overt_guard_workers_total") == 2, "a worker")  # type: ignore[union-attr]
    found = values(exporter.text(guarded.guard.socket))
    assert found[device] == 1 and found["overt_guard_errors_total"] == 0  # on record, and counted by the one that died


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
    assert [name for name in names if not re.search(rf"alertname: {name}\n        exp_alerts:\n", tests)] == []


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


def test_it_answers_http(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [*WORDS, "--socket", str(tmp_path / "guard"), "--listen", f"127.0.0.1:{port}"]
    process = subprocess.Popen(words, env=ENVIRONMENT)

    def answer() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                return str(page.read().decode())
        except OSError:
            return ""

    try:
        wait_until(lambda: "overt_guard_up 0.0" in answer(), "an answer")
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


@pytest.mark.parametrize("address", ["here", "localhost:0", "1.2.3.4:http"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    done = subprocess.run(
        [*WORDS, "--listen", address], capture_output=True, text=True, timeout=30, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert f"no address and port: {address}" in done.stderr and done.stderr.count("\n") == 1
