"""`perennial up` as a person runs it: kcat publishes plain JSON and reads what was promoted, Ctrl-C stops everything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perennial.streams.devstack.discovery import running
from perennial.streams.devstack.process_guard import alive
from perennial.streams.devstack.supervisor import ROLES
from tests.oracle import wait_until
from tests.services import missing_service, sigint_ignored

SMALL = {
    "max_batch_examples": 4, "max_age_s": 3, "steps": 1, "rows": 4, "row_tokens": 48, "max_tokens": 48, "threads": 1,
    "anchor_rows": 2, "max_general_rise_nats": 50, "min_gain_nats": -50, "poll_s": 1,
}  # fmt: skip


@pytest.mark.slow(35)
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("broker_jars")
def test_kcat_publishes_and_reads_what_was_promoted(tmp_path: Path):
    if not shutil.which("kcat"):
        missing_service("kcat is not installed (Debian package kcat)")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
    env |= {f"PERENNIAL_{name.upper()}": str(value) for name, value in SMALL.items()}
    log = tmp_path / "up.log"
    with log.open("wb") as output, sigint_ignored():
        up = subprocess.Popen(
            [sys.executable, "-m", "perennial.streams.cli", "up", "--data-dir", str(tmp_path / "data")],
            env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: up.poll() is not None or running(tmp_path / "data") is not None, 240, "up is up")
        facts = running(tmp_path / "data")
        assert facts is not None, log.read_text()
        kafka = str(facts["kafka"])
        lines = [
            json.dumps({"adapter": "acme/kcat", "document_id": f"d{n}", "text": f"Note {n}: parcels leave at noon."})
            for n in range(8)
        ]
        subprocess.run(
            ["kcat", "-b", kafka, "-t", "documents", "-P"], input="\n".join(lines), text=True, check=True, timeout=120
        )

        def promoted() -> list[dict[str, object]]:
            read = subprocess.run(
                ["kcat", "-b", kafka, "-t", "adapter-updates", "-C", "-e", "-q", "-f", "%h\t%s\n"],
                text=True, check=True, timeout=120, capture_output=True,
            )  # fmt: skip
            rows = [line.split("\t", 1) for line in read.stdout.splitlines() if line]
            return [json.loads(value) for headers, value in rows if "ce_type=adapter.promoted" in headers]

        wait_until(lambda: bool(promoted()), 120, "a promoted version on adapter-updates", every_s=1)
        state = promoted()[-1]
        assert state["adapter"] == "acme/kcat"
        assert state["learned"]["examples"] >= 1  # type: ignore[index]
        up.send_signal(signal.SIGINT)
        assert up.wait(120) == 0, log.read_text()
        assert running(tmp_path / "data") is None
        assert "stopped; everything learned is kept" in " ".join(log.read_text().split())
    finally:
        if up.poll() is None:
            up.terminate()
            up.wait(120)


@pytest.mark.usefixtures("broker_jars")
def test_ctrl_c_stops_a_start_and_leaves_no_process(tmp_path: Path):
    log, data_dir = tmp_path / "up.log", tmp_path / "data"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
    command = [sys.executable, "-m", "perennial.streams.cli", "up", "--data-dir", str(data_dir)]
    with log.open("wb") as output, sigint_ignored():
        up = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True)
    try:
        children = Path(f"/proc/{up.pid}/task/{up.pid}/children")
        wait_until(lambda: len(children.read_text().split()) >= len(ROLES), 60, "the roles were started")
        roles = [int(pid) for pid in children.read_text().split()]
        up.send_signal(signal.SIGINT)
        assert up.wait(120) == 130, log.read_text()
        assert not [pid for pid in roles if alive(pid, None)]
        assert running(data_dir) is None
    finally:
        if up.poll() is None:
            up.terminate()
            up.wait(120)
