"""The story that `scripts/quickstart` tells: the whole loop on real handwritten digits, every claim checked as it goes.

Broker, fleet service, large model, simulated link and device are processes of their own (`hedgerow_cloud.stack`); what
is reported comes from inference over gRPC on images that nothing was trained on, in this run.
"""

import asyncio
import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from scipy.stats import binom

from hedgerow import release
from hedgerow.client import Client
from hedgerow.config import BrokerSettings
from hedgerow.errors import DeadlineExceeded
from hedgerow.link import Link, Topics
from hedgerow.policies import Privacy, Tier
from hedgerow.proto import fleet_pb2, link_pb2
from hedgerow_cloud import console, provision
from hedgerow_cloud.fleet.client import FleetClient
from hedgerow_cloud.learn import data
from hedgerow_cloud.learn.pipeline import MODEL, Outcome, first_release, next_release
from hedgerow_cloud.linkshaper import read_counts
from hedgerow_cloud.stack import Stack
from hedgerow_cloud.traffic import Traffic, stream

DEVICE = "here"
EPSILON = 0.02
DELTA = 0.05
RTT_MS = 40.0
INSTALL_TIMEOUT_S = 60.0
RECOVERY_TIMEOUT_S = 60.0
SAMPLES_TIMEOUT_S = 60.0
REFUSAL_TIMEOUT_S = 60.0
LOOK_S = 0.2


@dataclass(slots=True)
class Row:
    """One way to answer the held-out images, as it was measured."""

    name: str
    traffic: Traffic
    cloud_bytes: int


@dataclass(slots=True)
class Story:
    """What the steps of the story share."""

    stack: Stack
    fleet: FleetClient
    digits: data.Digits
    seed: int
    failed_claims: list[str] = field(default_factory=list)

    def claim(self, text: str, held: bool) -> None:
        """Say `text` and whether it held."""
        say(f"  {'ok ' if held else 'NOT'} {text}")
        if not held:
            self.failed_claims.append(text)

    def client(self, name: str = "edge") -> Client:
        """A client of one of the daemons."""
        return Client(self.stack.address(name))

    def cloud_bytes(self) -> int:
        """Bytes that went up the link to the cloud so far."""
        return asyncio.run(read_counts(self.stack.settings.ports.link_stats)).up_bytes


def run(*, home: Path | None, seed: int, keep: bool) -> int:
    """Tell the story; 0 if every claim held, 1 otherwise. The daemons are stopped at the end unless `keep`."""
    began = time.monotonic()
    folder = home or Path(tempfile.mkdtemp(prefix="hedgerow-demo-"))
    try:
        failed = _tell(folder, seed=seed, keep=keep)
    finally:
        if home is None and not keep:
            shutil.rmtree(folder, ignore_errors=True)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    say("")
    if failed:
        say(f"{len(failed)} claims did not hold (after {minutes} min {seconds} s):")
        for text in failed:
            say(f"  - {text}")
        return 1
    say(f"Every claim held. {minutes} min {seconds} s.")
    _where_next(folder, keep=keep)
    return 0


def _tell(home: Path, *, seed: int, keep: bool) -> list[str]:
    say("Hedgerow on handwritten digits: 1,797 real scans of 8x8 pixels, split by the seed")
    step(1, "train a large model, distil a small one, quantize it, certify the split between them")
    first = first_release(home / "learn" / "1", seed=seed, epsilon=EPSILON, delta=DELTA, report=indented)

    with contextlib.ExitStack() as leaving:
        stack = Stack.provision(home, device=DEVICE, rtt_ms=RTT_MS)
        if not keep:
            leaving.enter_context(stack)
        stack.teach(MODEL, first.teacher)
        stack.start()
        fleet = leaving.enter_context(FleetClient(stack.address("fleet")))
        story = Story(stack, fleet, data.load(seed), seed)

        step(2, "publish release 1; the device fetches it over MQTT, verifies, proves and activates it")
        say(f"  running: {', '.join(stack.running())} (a process each)")
        publish_and_install(story, first)
        old_directions = copy_directions(story)

        step(3, f"stream the {len(story.digits.held_out)} held-out images; the cloud is {RTT_MS:g} ms away (simulated)")
        before = compare(story, first)

        step(4, "stop the cloud, stream again, start it again")
        outage(story)

        step(5, "learn from what was escalated, roll release 2 out while requests stream")
        second = learn(story, first)
        roll_out_live(story, second)
        say("")
        after = compare(story, second)
        report_change(before, after, first, second)

        step(6, "tamper with it")
        flip_a_byte(story, second)
        replay(story, old_directions)
        with story.client() as client:
            last = stream(client, MODEL, story.digits.held_out.images[:20], Privacy.NO_LEARNING, nothing)
        story.claim(
            f"release {second.manifest.counter} still serves",
            not last.failures and set(last.releases) == {second.manifest.name},
        )
        if keep:
            stack.remember()
        return story.failed_claims


# Step 2


def publish_and_install(story: Story, outcome: Outcome) -> int:
    """Sign, upload and assign a release, and wait until the device runs it; the bytes that the device fetched."""
    publish(story, outcome.release)
    fetched = story.fleet.device(DEVICE).bytes_fetched
    story.fleet.assign(MODEL, outcome.manifest.counter, [DEVICE])
    began = time.monotonic()
    with console.progress(f"  {DEVICE} fetches {outcome.manifest.name}") as advance:
        device = wait_for(story, lambda device, model: _runs(device, model, outcome, advance), INSTALL_TIMEOUT_S)
    got = device.bytes_fetched - fetched
    running = _model(device)
    story.claim(
        f"{DEVICE} runs {outcome.manifest.name} after {time.monotonic() - began:.1f} s and {console.size(got)}"
        + (f" (refused: {running.reason or device.trust})" if running.reason or device.trust else ""),
        running.running == outcome.manifest.counter,
    )
    return got


def publish(story: Story, folder: Path) -> None:
    """Sign a release with the offline keys and upload it to the fleet service."""
    manifest = (folder / release.MANIFEST).read_bytes()
    targets = provision.sign(story.stack.keys, story.fleet.metadata("targets.json"), manifest)
    published = story.fleet.publish(folder, targets)
    say(f"  published {published.model}/{published.counter}: {console.size(published.bytes)}, signed offline")


def wait_for(
    story: Story, done: Callable[[fleet_pb2.Device, link_pb2.ModelStatus], bool], timeout_s: float
) -> fleet_pb2.Device:
    """The device's facts once they are `done`, or as they are when the time is up."""
    device = story.fleet.device(DEVICE)
    with contextlib.suppress(DeadlineExceeded), contextlib.closing(story.fleet.watch(DEVICE, timeout_s)) as changes:
        for device in changes:
            if done(device, _model(device)):
                break
    return device


def _runs(
    device: fleet_pb2.Device, model: link_pb2.ModelStatus, outcome: Outcome, advance: Callable[[int, int], None]
) -> bool:
    counter = outcome.manifest.counter
    if model.target == counter:
        advance(model.bytes_done, model.bytes_total)
    confirmed = model.running == counter and not model.target
    return confirmed or model.failed == counter or bool(device.trust)


def _model(device: fleet_pb2.Device) -> link_pb2.ModelStatus:
    return next((model for model in device.models if model.model == MODEL), link_pb2.ModelStatus())


# Step 3


def compare(story: Story, outcome: Outcome) -> Row:
    """Answer the held-out images in three ways, print the table and check the guarantee; Hedgerow's row."""
    images, labels = story.digits.held_out.images, story.digits.held_out.labels
    ways = (
        ("edge only", "edge", Privacy.EDGE_ONLY),
        ("cloud only", "link", Privacy.DEFAULT),
        ("Hedgerow", "edge", Privacy.NO_LEARNING),
    )
    rows = []
    for name, server, privacy in ways:
        with story.client(server) as client, console.progress(f"  {name}", unit="requests") as advance:
            client.infer(MODEL, images[:1], parameters={"hedgerow_privacy": privacy.value})  # connects
            sent = story.cloud_bytes()
            traffic = stream(client, MODEL, images, privacy, advance)
            rows.append(Row(name, traffic, story.cloud_bytes() - sent))
    edge, cloud, hedgerow = rows
    console.table(
        ("", "right", "on device", "p50", "p95", "to cloud", "unlike cloud"),
        [
            (
                row.name,
                f"{row.traffic.accuracy(labels):.1%}",
                "0.0%" if row is cloud else f"{row.traffic.share(Tier.EDGE):.1%}",
                f"{row.traffic.latency_ms(0.5):.1f} ms",
                f"{row.traffic.latency_ms(0.95):.1f} ms",
                console.size(0 if row is edge else row.cloud_bytes),
                f"{row.traffic.unlike(cloud.traffic) / len(labels):.1%}",
            )
            for row in rows
        ],
    )
    guarantee, count = outcome.guarantee, len(labels)
    unlike = hedgerow.traffic.unlike(cloud.traffic)
    # How likely so many would be if the true risk were the promised one: the promise is refuted if that is below delta.
    story.claim(
        f"{unlike} of {count} answers unlike the cloud's ({unlike / count:.2%}); promised: {guarantee}",
        float(binom.sf(unlike - 1, count, guarantee.epsilon)) >= guarantee.delta,
    )
    story.claim(
        "every request was answered, none degraded",
        not any(row.traffic.failures for row in rows) and not any(hedgerow.traffic.degraded),
    )
    return hedgerow


# Step 4


def outage(story: Story) -> None:
    """The cloud goes away and comes back."""
    images, labels = story.digits.held_out.images, story.digits.held_out.labels
    story.stack.stop("serve")
    with story.client() as client, console.progress("  without the cloud", unit="requests") as advance:
        traffic = stream(client, MODEL, images, Privacy.NO_LEARNING, advance)
    say(
        f"  without the cloud: {traffic.accuracy(labels):.1%} right, "
        f"p95 {traffic.latency_ms(0.95):.1f} ms, {sum(traffic.degraded) / len(traffic):.1%} marked degraded"
    )
    story.claim(
        f"all {len(traffic)} requests answered on the device", not traffic.failures and traffic.share(Tier.EDGE) == 1.0
    )
    story.claim("what the gate was unsure of is marked degraded", any(traffic.degraded) and not all(traffic.degraded))

    story.stack.start("serve")
    unsure = images[traffic.degraded.index(True)]
    began, answer = time.monotonic(), Traffic()
    with story.client() as client:
        while time.monotonic() - began < RECOVERY_TIMEOUT_S:
            answer.ask(client, MODEL, unsure, Privacy.NO_LEARNING)
            if answer.tiers[-1] == Tier.CLOUD:
                break
            time.sleep(LOOK_S)  # polls from outside, as any client would
    story.claim(
        f"the cloud is back and the breaker closed by itself after {time.monotonic() - began:.1f} s",
        answer.tiers[-1] == Tier.CLOUD and not answer.failures,
    )


# Step 5


def learn(story: Story, base: Outcome) -> Outcome:
    """Let the device work on the field's images, wait for the samples, and train the next student with them."""
    images = story.digits.field.images
    with story.client() as client, console.progress("  the device at work", unit="requests") as advance:
        work = stream(client, MODEL, images, Privacy.DEFAULT, advance)
    escalated = work.tiers.count(Tier.CLOUD)
    began = time.monotonic()
    while len(samples := list(story.fleet.samples(MODEL))) < escalated and time.monotonic() - began < SAMPLES_TIMEOUT_S:
        time.sleep(LOOK_S)  # the fleet tells nobody about samples
    story.claim(
        f"{len(images)} images of everyday traffic: {escalated} escalated, {len(samples)} samples reached the fleet",
        len(samples) == escalated and not work.failures,
    )
    outcome = next_release(
        story.stack.home / "learn" / str(base.manifest.counter + 1),
        base=base.folder,
        teacher=base.teacher,
        samples=samples,
        counter=base.manifest.counter + 1,
        seed=story.seed,
        epsilon=EPSILON,
        delta=DELTA,
        report=indented,
    )
    story.claim("no held-out image was kept as a sample", not outcome.dropped.get("reserved"))
    return outcome


def roll_out_live(story: Story, outcome: Outcome) -> None:
    """Install a release while requests stream."""
    with _streaming(story) as traffic:
        got = publish_and_install(story, outcome)
    served = sorted(set(traffic.releases))
    story.claim(
        f"{len(traffic)} requests streamed meanwhile, {len(traffic.failures)} failed; releases {' and '.join(served)}",
        not traffic.failures and outcome.manifest.name in served and len(served) == 2,
    )
    say(f"  the update was sent in full: {console.size(got)}")


@contextlib.contextmanager
def _streaming(story: Story) -> Iterator[Traffic]:
    """Requests, one after the other, for the length of the ``with``."""
    traffic, enough = Traffic(), threading.Event()

    def work() -> None:
        with story.client() as client:
            while not enough.is_set():
                for image in story.digits.field.images:
                    traffic.ask(client, MODEL, image, Privacy.NO_LEARNING)
                    if enough.is_set():
                        break

    thread = threading.Thread(target=work, name="requests")
    thread.start()
    try:
        yield traffic
    finally:
        enough.set()
        thread.join()


def report_change(before: Row, after: Row, first: Outcome, second: Outcome) -> None:
    """What release 2 changed."""
    say(
        f"  release {first.manifest.counter} → {second.manifest.counter}: on the device "
        f"{before.traffic.share(Tier.EDGE):.1%} → {after.traffic.share(Tier.EDGE):.1%}, to the cloud "
        f"{console.size(before.cloud_bytes)} → {console.size(after.cloud_bytes)}, "
        f"p95 {before.traffic.latency_ms(0.95):.1f} → {after.traffic.latency_ms(0.95):.1f} ms"
    )


# Step 6


def flip_a_byte(story: Story, good: Outcome) -> None:
    """Publish and assign a signed release, with one byte of its model flipped where the fleet keeps it."""
    folder = story.stack.home / "learn" / "tampered"
    counter = good.manifest.counter + 1
    shutil.copytree(good.release, folder, dirs_exist_ok=True)
    manifest = msgspec.structs.replace(good.manifest, counter=counter)
    (folder / release.MANIFEST).write_bytes(manifest.encode())
    publish(story, folder)

    model = manifest.file(manifest.variants[0].file)
    blob = story.stack.home / "fleet" / "blobs" / model.sha256
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    story.fleet.assign(MODEL, counter, [DEVICE])
    device = wait_for(story, lambda _, model: model.target == counter and bool(model.reason), REFUSAL_TIMEOUT_S)
    blob.write_bytes(whole)
    reason = _model(device).reason
    story.claim(
        f"a flipped byte in {manifest.name} is refused: {reason or 'no reason given'}",
        _model(device).running == good.manifest.counter and "sha256" in reason,
    )
    story.fleet.assign(MODEL, good.manifest.counter, [DEVICE])


def copy_directions(story: Story) -> Path:
    """What the director has signed for the device now, kept by somebody who means no good."""
    return Path(shutil.copytree(_directions(story), story.stack.home / "replay", dirs_exist_ok=True))


def replay(story: Story, old: Path) -> None:
    """Put the old directions back, all properly signed, and have the device look."""
    wait_for(story, lambda _, model: not model.target, REFUSAL_TIMEOUT_S)
    current = story.stack.home / "current"
    shutil.copytree(_directions(story), current, dirs_exist_ok=True)
    shutil.copytree(old, _directions(story), dirs_exist_ok=True)
    asyncio.run(_tell_to_check(story))
    device = wait_for(story, lambda device, _: bool(device.trust), REFUSAL_TIMEOUT_S)
    shutil.copytree(current, _directions(story), dirs_exist_ok=True)
    story.claim(
        f"the replayed directions of release 1 are refused: {device.trust or 'they were not'}", bool(device.trust)
    )


async def _tell_to_check(story: Story) -> None:
    """What anybody who can reach the broker could do."""
    settings = story.stack.settings
    topics = Topics(settings.fleet)
    link = Link(BrokerSettings(port=settings.ports.broker), "intruder")
    command = link_pb2.Command(kind=link_pb2.Command.CHECK, serial=2**32)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(link.run())
        await link.wait_connected()
        await link.publish(topics.command(DEVICE), command.SerializeToString())
        running.cancel()


def _directions(story: Story) -> Path:
    return story.stack.home / "fleet" / "director" / "devices" / DEVICE


# Words


def say(line: str) -> None:
    """A line of the story."""
    print(line, flush=True)  # noqa: T201 (the story goes to standard output)


def indented(line: str) -> None:
    """A line of a step."""
    say(f"  {line}")


def step(number: int, text: str) -> None:
    """The heading of a step."""
    say(f"\n{number}. {text}")


def nothing(_done: int, _total: int) -> None:
    """Progress that nobody needs to see."""


def _where_next(home: Path, *, keep: bool) -> None:
    say("")
    if keep:
        say(f"Everything is still running, from {home}:")
        say("  hedgerow devices               what the device runs")
        say("  hedgerow releases              what is published, with each guarantee")
        say("  hedgerow infer digits my.png   ask it about a picture of yours")
        say("  hedgerow down                  stop everything")
    else:
        say("Where to go next: scripts/quickstart --keep leaves everything running for `hedgerow devices`, `releases`")
        say(
            "and `infer`; README.md says how to bring two ONNX files of your own; runtime/ARCHITECTURE.md how it works."
        )
