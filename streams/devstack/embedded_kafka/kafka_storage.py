"""Format the data folder of a new embedded broker."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from perennial.streams.devstack.embedded_kafka.kafka_config import (
    NODE_ID,
    new_cluster_id,
    render_properties,
    server_properties,
)
from perennial.streams.devstack.embedded_kafka.kafka_jars import OWN_BROKER, BrokerError, kafka_home


def is_formatted(folder: Path) -> bool:
    """Return whether the broker's data folder was formatted before."""
    return (folder / "topics" / "meta.properties").exists()


def format_storage(folder: Path, java: Sequence[str]) -> None:
    """Make folder/topics: an empty storage folder with a new cluster id and a new directory id.

    Kafka's own tool costs a second of Java, so it runs once per cache. Its result holds only feature levels and is
    copied. meta.properties is written as Kafka's MetaPropertiesVersion.V1 has it, and last, so that an interrupted
    format is not taken for a whole one.

    Args:
        folder: the broker's data folder; the caller holds its lock.
        java: the command that runs Java with Kafka's class path.

    Raises:
        BrokerError: Kafka's tool failed.
    """
    home = kafka_home()
    temporary = Path(tempfile.mkdtemp(prefix="formatted.", dir=home if os.access(home, os.W_OK) else folder))
    try:
        template = home / "formatted"
        if not template.exists():
            _run_tool(temporary, java)
            try:
                (temporary / "topics").rename(template)
            except OSError:  # the cache is read-only, or another process was first
                template = temporary / "topics"
        partial = folder / "topics.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left behind by a start that was killed
        shutil.copytree(template, partial)
        ids = [new_cluster_id(uuid.uuid4().bytes) for _ in range(2)]
        (partial / "meta.properties").write_text(
            f"version=1\ncluster.id={ids[0]}\ndirectory.id={ids[1]}\nnode.id={NODE_ID}\n", encoding="ascii"
        )
        partial.rename(folder / "topics")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run_tool(folder: Path, java: Sequence[str]) -> None:
    properties = folder / "server.properties"
    properties.write_text(render_properties(server_properties(folder, 1, 2, {})), encoding="ascii")
    cluster_id = new_cluster_id(uuid.uuid4().bytes)
    command = [*java, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, check=False)
    if result.returncode != 0:
        raise BrokerError(
            f"a new data folder cannot be formatted:\n{(result.stdout + result.stderr)[-2000:]}\n",
            got=f"exit status {result.returncode}",
            remedy=f"correct what is named above, or {OWN_BROKER}",
        )
