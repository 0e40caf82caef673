"""Swap versions in a real vLLM server under load: `python -m tests.benchmarks.bench_serving`, or `make bench-serving`.

Publishes versions with random weights through the registry, which `perennial subscribe --backend vllm` in a process of
its own finds by polling the alias; there is no broker. Clients ask for the version that the file `@live.json` names.
Prints a table of the stages; the last line is JSON:

- promoted_to_answered: from the moment when the alias moved to the first answer by the new version, under load.
- throughput_ratio: tokens per second of the clients while versions are swapped, against none, in turns.
- cpu_ratio: the same by the processor time of the server and the subscriber; other programs on the machine change it less.
- two_versions_ratio: tokens per second of clients that ask two loaded versions, none of which is swapped, against one.
- mixed_replies: answers whose log-probabilities are not those of the version that they name, by the learner's own code.
- stale_replies_after_ack: answers by an earlier version to requests that began after a version was acknowledged.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Self

from perennial.learner.training.probes import predicted_after
from perennial.streams.client.directory_backend import DirectoryBackend
from perennial.streams.probe_texts import PROBE_TEXTS
from tests.vllm.lora_versions import ADAPTER, Made, VersionMaker
from tests.vllm.vllm_server import MAX_CPU_LORAS, VllmServer
from tools.vllm_env import vllm_python

PROMPTS = ("The refund for the last order", "Invoices are sent", "The shop opens at nine, and", "A parcel that is lost")
POLL_S = 0.1
TOKENS = 16
RIGHT_NATS = 0.12
SETTLE_S = 3.0
WAIT_S = 120.0
_SERVED = re.compile(r"generation (?P<generation>\d+) is served.*\((?P<stages>.*)\)")


@dataclass(frozen=True)
class Reply:
    """One answer to a client.

    Attributes:
        begin_s: When the request began, monotonic clock.
        end_s: When the answer was complete.
        asked: Name of the version that the client asked for.
        status: HTTP status.
        answer: The answer's JSON.
        prompt: The prompt.
    """

    begin_s: float
    end_s: float
    asked: str
    status: int
    answer: dict[str, Any]
    prompt: str

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids of the answer."""
        return tuple(int(token.removeprefix("token_id:")) for token in self.answer["choices"][0]["logprobs"]["tokens"])


class Client:
    """Asks one server over one connection.

    Args:
        port: Port of the server.
        folder: Folder of the versions; its file names the version to ask for.
    """

    def __init__(self, port: int, folder: Path) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        self._folder = DirectoryBackend(folder)
        self._used_s = 0.0

    def current(self) -> str | None:
        """Return the version to ask for."""
        return self._folder.current(ADAPTER)

    def ask(self, prompt: str, tokens: int, name: str | None = None) -> Reply:
        """Ask a version, or the current one where no name is given."""
        begin_s = time.monotonic()
        if begin_s - self._used_s > 2:  # the server closes a connection that was idle for 5 s
            self._connection.close()
        name = name or self.current() or ""
        content = {
            "model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "logprobs": 1, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        try:
            status, answer = self._post(content)
        except (ConnectionError, http.client.RemoteDisconnected):  # closed between the check and the request
            self._connection.close()
            status, answer = self._post(content)
        self._used_s = time.monotonic()
        return Reply(begin_s, self._used_s, name, status, answer, prompt)

    def _post(self, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self._connection.request("POST", "/v1/completions", json.dumps(content), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())


class Load:
    """Clients that ask without a pause.

    Args:
        clients: Number of clients.
        port: Port of the server.
        folder: Folder of the versions.

    Attributes:
        replies: All answers.
        fixed: Names that the clients ask in turn; empty: what is current.
        errors: What ended clients.
    """

    def __init__(self, clients: int, port: int, folder: Path) -> None:
        self.replies: list[Reply] = []
        self.fixed: tuple[str, ...] = ()
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(Client(port, folder), number)) for number in range(clients)
        ]

    def _run(self, client: Client, number: int) -> None:
        turn = number
        try:
            while not self._stop.is_set():
                fixed = self.fixed
                name = fixed[number % len(fixed)] if fixed else None
                self.replies.append(client.ask(PROMPTS[turn % len(PROMPTS)], TOKENS, name))
                turn += 1
        except Exception as error:  # noqa: BLE001 - the main thread raises it
            self.errors.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
        if self.errors:  # fewer clients than it says would have made the load
            raise RuntimeError("a client ended before the others") from self.errors[0]

    def tokens(self, begin_s: float, end_s: float) -> int:
        """Return the number of tokens of the answers that ended in an interval."""
        return sum(TOKENS for reply in self.replies if begin_s <= reply.end_s < end_s and reply.status == 200)


class Subscription:
    """`perennial subscribe` as a child process.

    Attributes:
        acknowledged_s: When each generation was served, monotonic clock.
        stages: Seconds of each stage, by name.
    """

    def __init__(self, store: Path, folder: Path, url: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PERENNIAL_")}
        environment |= {"PERENNIAL_STORE": str(store), "PERENNIAL_POLL_S": str(POLL_S), "XDG_DATA_HOME": str(store)}
        self.acknowledged_s: dict[int, float] = {}
        self.stages: dict[str, list[float]] = {}
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "perennial.streams.cli", "subscribe", ADAPTER, "--backend", "vllm", "--url", url,
                "--folder", str(folder), "--max-cpu-loras", str(MAX_CPU_LORAS),
            ],
            stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = _SERVED.search(line)
            if found:
                self.acknowledged_s[int(found["generation"])] = time.monotonic()
                for stage in found["stages"].split(", "):
                    name, seconds = stage.split(" ")
                    self.stages.setdefault(name, []).append(float(seconds))

    def wait_for(self, generation: int) -> None:
        """Wait until a generation is served."""
        end_s = time.monotonic() + WAIT_S
        while generation not in self.acknowledged_s:
            if time.monotonic() > end_s or self._process.poll() is not None:
                raise RuntimeError(f"generation {generation} was not served")
            time.sleep(0.005)

    def cpu_s(self) -> float:
        """Return the processor time that it has used, in seconds."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it as SIGTERM does."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(WAIT_S)


@dataclass
class Spent:
    """What one kind of interval spent.

    Attributes:
        tokens: Tokens that clients got in each interval.
        seconds: Length of each interval.
        cpu_s: Processor time of the server and the subscriber in each interval.
    """

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / sum(self.seconds)

    @property
    def tokens_per_cpu_s(self) -> float:
        return sum(self.tokens) / sum(self.cpu_s)

    @property
    def rates(self) -> list[int]:
        """Tokens per second of each interval."""
        return [round(tokens / seconds) for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]


@contextmanager
def spent(load: Load, server: VllmServer, subscription: Subscription, into: Spent) -> Iterator[None]:
    """Measure what the block spends."""
    begin_s, cpu_s = time.monotonic(), server.cpu_s() + subscription.cpu_s()
    yield
    end_s = time.monotonic()
    into.cpu_s.append(server.cpu_s() + subscription.cpu_s() - cpu_s)
    into.seconds.append(end_s - begin_s)
    into.tokens.append(load.tokens(begin_s, end_s))


def measure_two(
    load: Load, server: VllmServer, subscription: Subscription, folder: Path, maker: VersionMaker, rest_s: float
) -> tuple[float, list[Made]]:
    """Return the throughput of two versions that stay loaded, against one, and the versions.

    An engine computes two versions in one batch otherwise than one, whatever brought the second.
    """
    made = maker.make(folder / "control-store", range(1000, 1002), "acme/control")
    folders = DirectoryBackend(folder / "control")
    for each in made:
        folders.load(*each.loaded)
        content = {"lora_name": each.name, "lora_path": str(folders.folder_of(each.name))}
        status, answer = server.call("/v1/load_lora_adapter", content)
        if status != 200:
            raise RuntimeError(f"the control's version was not loaded: {answer}")
    one, two = Spent(), Spent()
    for _ in range(2):
        for names, into in ((made[:1], one), (made, two)):
            load.fixed = tuple(each.name for each in names)
            time.sleep(1)
            with spent(load, server, subscription, into):
                time.sleep(rest_s)
    load.fixed = ()
    print(f"tokens per second of one loaded version {one.rates}, of two {two.rates}")
    return two.tokens_per_s / one.tokens_per_s, made


def first_answer_s(client: Client, made: Made) -> float:
    """Wait until the version answers; return the seconds since the alias was moved to it."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        if client.current() != made.name:
            time.sleep(0.002)
            continue
        reply = client.ask(PROMPTS[0], 1)
        if reply.status == 200 and reply.answer["model"] == made.name:
            return time.time() - made.published_s
    raise RuntimeError(f"{made.name} never answered")


def mixed(maker: VersionMaker, versions: Sequence[Made], replies: Sequence[Reply]) -> int:
    """Return the number of answers that are not by the version that they name."""
    made = {each.name: each for each in versions}
    groups: dict[tuple[str, str, tuple[int, ...]], list[Reply]] = {}
    for reply in replies:
        groups.setdefault((reply.asked, reply.prompt, reply.tokens), []).append(reply)
    wrong = 0
    for (name, prompt, tokens), same in groups.items():
        expected = maker.nats_of(made[name].tensors, maker.codec.text_ids(prompt), tokens)
        for reply in same:
            found = reply.answer["choices"][0]["logprobs"]["token_logprobs"]
            far = fmean(abs(one - other) for one, other in zip(found, expected, strict=True)) > RIGHT_NATS
            wrong += far or reply.answer["model"] != name
    return wrong


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Return median and 95th percentile."""
    cuts = quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


def measure(arguments: argparse.Namespace, python: Path, folder: Path) -> dict[str, Any]:
    """Run the benchmark and return what the last line says."""
    maker = VersionMaker(arguments.base)
    print(f"preparing {arguments.swaps} versions of rank {maker.rank} for {arguments.base}", flush=True)
    prepared = []
    for seed in range(arguments.swaps + 1):
        tensors = maker.tensors(seed)
        maker.lora.load(tensors)
        prepared.append((tensors, predicted_after(PROBE_TEXTS, maker.lora, maker.codec)))
    publisher = maker.publisher(folder / "store")
    server = VllmServer(python, maker.folder, folder / "vllm.log")
    print("starting vLLM", flush=True)
    server.start()
    subscription = Subscription(folder / "store", folder / "served", server.url)
    try:
        version = server.call("/version")[1]["version"]
        versions = [maker.publish_prepared(publisher, *prepared[0])]
        subscription.wait_for(1)
        probing = Client(server.port, folder / "served")
        first_answer_s(probing, versions[0])
        answered: list[float] = []
        calm, swapping = Spent(), Spent()
        intervals = random.Random(0)  # equal ones meet the end of the grace time always or never
        with Load(arguments.clients, server.port, folder / "served") as load:
            time.sleep(arguments.rest_s)  # the first requests compile and fill caches
            for turn in range(arguments.turns):
                with spent(load, server, subscription, calm):
                    time.sleep(arguments.rest_s)
                share = len(prepared[1:]) * (turn + 1) // arguments.turns
                with spent(load, server, subscription, swapping):
                    for each in prepared[len(versions) : share + 1]:
                        due_s = time.monotonic() + arguments.every_s * intervals.uniform(0.5, 1.5)
                        versions.append(maker.publish_prepared(publisher, *each))
                        answered.append(first_answer_s(probing, versions[-1]))
                        time.sleep(max(0.0, due_s - time.monotonic()))
                time.sleep(SETTLE_S)  # the last swap's earlier version is unloaded
            two_versions, control = measure_two(load, server, subscription, folder, maker, arguments.rest_s)
            replies = list(load.replies)
    finally:
        subscription.stop()
        server.stop()
    good = [reply for reply in replies if reply.status == 200]
    versions_and_control = [*versions, *control]
    order = {each.name: index + 1 for index, each in enumerate(versions)}
    stale = sum(
        any(
            served_s < reply.begin_s and order.get(reply.answer["model"], 0) < generation
            for generation, served_s in subscription.acknowledged_s.items()
        )
        for reply in good
        if reply.asked in order
    )
    for stage, seconds in subscription.stages.items():
        p50, p95 = percentiles(seconds)
        print(f"{stage:>10}  p50 {p50:.3f} s  p95 {p95:.3f} s")
    p50, p95 = percentiles(answered)
    load_p50, load_p95 = percentiles(subscription.stages["load"])
    print(f"tokens per second without swaps {calm.rates}, with {swapping.rates}")
    return {
        "engine": f"vllm {version}", "base": arguments.base, "swaps": len(answered), "clients": arguments.clients, "every_s": arguments.every_s,
        "promoted_to_answered_p50_s": round(p50, 3), "promoted_to_answered_p95_s": round(p95, 3),
        "load_p50_s": round(load_p50, 3), "load_p95_s": round(load_p95, 3),
        "tokens_per_s": round(calm.tokens_per_s, 1),
        "throughput_ratio": round(swapping.tokens_per_s / calm.tokens_per_s, 3),
        "cpu_ratio": round(swapping.tokens_per_cpu_s / calm.tokens_per_cpu_s, 3),
        "cores": round(sum(calm.cpu_s) / sum(calm.seconds), 2), "two_versions_ratio": round(two_versions, 3),
        "replies": len(replies), "refused_replies": len(replies) - len(good),
        "mixed_replies": mixed(maker, versions_and_control, good), "stale_replies_after_ack": stale,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="shipped", help="name or folder of the base")
    parser.add_argument("--swaps", type=int, default=50, help="versions that are swapped in")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds from one version to the next, in the mean")
    parser.add_argument("--turns", type=int, default=10, help="times that swaps and none take turns")
    parser.add_argument("--rest-s", type=float, default=8.0, help="seconds without swaps in each turn")
    arguments = parser.parse_args()
    python = vllm_python()
    if python is None:
        print("there is no environment with vLLM: `make vllm-env` builds it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, python, Path(folder))
    print(json.dumps(found))
    return int(bool(found["mixed_replies"] or found["stale_replies_after_ack"]))


if __name__ == "__main__":
    sys.exit(main())
