"""The steps of the story, in their order.

Broker, fleet service, large model, simulated link and device are processes of their own (`hedgerow_cloud.local.stack`).
What is reported comes from inference over gRPC, in this run, on images that nothing was trained on.
"""

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hedgerow.errors import HedgerowError
from hedgerow.policies import Privacy, Tier
from hedgerow.proto import fleet_pb2, link_pb2
from hedgerow_cloud.certify.bounds import lower_binomial
from hedgerow_cloud.cli import console
from hedgerow_cloud.demo import attack
from hedgerow_cloud.demo.scene import DEVICE, Scene, say, say_indented
from hedgerow_cloud.demo.traffic import Traffic, stream
from hedgerow_cloud.fleet.client import FleetClient
from hedgerow_cloud.learn import data
from hedgerow_cloud.learn.pipeline import MODEL, Outcome, first_release, next_release
from hedgerow_cloud.local.stack import Stack

EPSILON = 0.02
DELTA = 0.05
RTT_MS = 40.0
INSTALL_TIMEOUT_S = 90.0
RECOVERY_TIMEOUT_S = 60.0
SAMPLES_TIMEOUT_S = 60.0
LOOK_S = 0.2
LAST_WORDS = 20
"""Requests that check what serves at the end."""


@dataclass(slots=True)
class Row:
    """One way to answer the held-out images, as it was measured."""

    name: str
    traffic: Traffic
    cloud_bytes: int


def run(*, home: Path | None, seed: int, keep: bool) -> int:
    """Tell the story; 0 if every claim held, 1 otherwise. The daemons are stopped at the end unless `keep`."""
    began = time.monotonic()
    folder = home or Path(tempfile.mkdtemp(prefix="hedgerow-demo-"))
    try:
        failed = _tell(folder, seed=seed, keep=keep)
    except HedgerowError as error:
        raise HedgerowError(f"{error} (what the daemons said: {folder / 'logs'})") from error
    if home is None and not keep and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    if failed:
        say(f"\n{len(failed)} claims did not hold ({minutes} min {seconds} s):")
        for text in failed:
            say(f"  - {text}")
        say(f"What the daemons said: {folder / 'logs'}")
        return 1
    say(f"\nEvery claim held ({minutes} min {seconds} s).\n")
    _say_where_next(folder, keep=keep)
    return 0


def _tell(home: Path, *, seed: int, keep: bool) -> list[str]:
    say("Hedgerow on handwritten digits: 1,797 real scans of 8x8 pixels, split by the seed")
    _step(1, "train a large model, distil a small one, quantize it, certify the split between them")
    with console.working("training"):
        first = first_release(home / "learn" / "1", seed=seed, epsilon=EPSILON, delta=DELTA, report=say_indented)

    with contextlib.ExitStack() as leaving:
        stack = Stack.provision(home, device=DEVICE, rtt_ms=RTT_MS)
        if not keep:
            leaving.enter_context(stack)
        stack.teach(MODEL, first.teacher)
        with console.working("starting broker, fleet service, large model, link and device"):
            stack.start()
        fleet = leaving.enter_context(FleetClient(stack.address("fleet")))
        scene = Scene(stack, fleet, data.load(seed), seed)
        scene.meet()

        _step(2, "publish release 1; the device fetches it over MQTT, verifies, proves and activates it")
        say(f"  running, a process each: {', '.join(stack.running())}")
        _roll_out(scene, first)
        old_directions = attack.copy_directions(scene)

        _step(
            3, f"stream the {len(scene.digits.held_out)} held-out images; the cloud is {RTT_MS:g} ms away (simulated)"
        )
        before = _compare(scene, first)

        _step(4, "stop the cloud, stream again, start it again")
        _survive_an_outage(scene)

        _step(5, "learn from what was escalated, and roll release 2 out while requests stream")
        second = _learn(scene, first)
        _roll_out(scene, second)
        after = _compare(scene, second)
        _say_what_changed(scene, before, after)

        _step(6, "tamper with it")
        attack.flip_a_byte(scene, second.manifest, second.release)
        attack.replay(scene, old_directions)
        with scene.client() as client:
            last = stream(client, MODEL, scene.digits.held_out.images[:LAST_WORDS], Privacy.NO_LEARNING)
        scene.claim(
            f"{second.manifest.name} still serves", not last.failures and set(last.releases) == {second.manifest.name}
        )
        if keep:
            stack.remember()
        return scene.failed_claims


def _roll_out(scene: Scene, outcome: Outcome) -> None:
    """Publish and assign a release, and wait until the device has confirmed it, while requests stream."""
    counter, name = outcome.manifest.counter, outcome.manifest.name
    with _streaming(scene) as traffic:
        scene.publish(outcome.release)
        fetched, began = scene.fleet.device(DEVICE).bytes_fetched, time.monotonic()
        scene.fleet.assign(MODEL, counter, [DEVICE])
        with console.progress(f"  {DEVICE} fetches {name}") as advance:
            device, status = scene.wait_for(_settled(counter, advance), INSTALL_TIMEOUT_S)
        seconds, got = time.monotonic() - began, device.bytes_fetched - fetched
    refusal = status.reason or device.trust
    scene.claim(
        f"{name} is confirmed on the device after {seconds:.1f} s; sent in full, {console.size(got)} over MQTT"
        + (f" (refused: {refusal})" if refusal else ""),
        status.running == counter and not status.target,
    )
    scene.claim(
        f"{len(traffic)} requests streamed meanwhile, {len(traffic.failures)} failed; answered by {_who(traffic)}",
        not traffic.failures and name in traffic.releases and len(set(traffic.releases)) > 1,
    )


def _settled(
    counter: int, advance: Callable[[int, int], None]
) -> Callable[[fleet_pb2.Device, link_pb2.ModelStatus], bool]:
    """Whether the device has confirmed or refused the release; `advance` hears of the bytes."""

    def settled(device: fleet_pb2.Device, status: link_pb2.ModelStatus) -> bool:
        if status.target == counter:
            advance(status.bytes_done, status.bytes_total)
        confirmed = status.running == counter and not status.target
        return confirmed or status.failed == counter or bool(device.trust)

    return settled


@contextlib.contextmanager
def _streaming(scene: Scene) -> Iterator[Traffic]:
    """Requests, one after the other, for the length of the ``with``."""
    traffic, enough = Traffic(), threading.Event()

    def work() -> None:
        with scene.client() as client:
            while not enough.is_set():
                for image in scene.digits.field.images:
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


def _who(traffic: Traffic) -> str:
    """Who answered, in the order of first appearance: the releases, and the cloud while there was none."""
    return ", then ".join(dict.fromkeys(release or "the cloud" for release in traffic.releases))


def _compare(scene: Scene, outcome: Outcome) -> tuple[Row, Row]:
    """Answer the held-out images in three ways, print the table and check the guarantee.

    Gives the rows of the small model alone and of Hedgerow.
    """
    images, labels = scene.digits.held_out.images, scene.digits.held_out.labels
    ways = (
        ("edge only", "edge", Privacy.EDGE_ONLY),
        ("cloud only", "link", Privacy.DEFAULT),
        ("Hedgerow", "edge", Privacy.NO_LEARNING),
    )
    rows = []
    for name, server, privacy in ways:
        with scene.client(server) as client, console.progress(f"  {name}", unit="requests") as advance:
            stream(client, MODEL, images[:1], privacy)  # connects
            sent = scene.cloud_bytes()
            traffic = stream(client, MODEL, images, privacy, advance)
            rows.append(Row(name, traffic, scene.cloud_bytes() - sent))
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
    guarantee, count, unlike = outcome.guarantee, len(labels), hedgerow.traffic.unlike(cloud.traffic)
    # What was observed refutes the promise if even the lower bound of the risk behind it is above epsilon.
    at_least = lower_binomial(unlike, count, guarantee.delta)
    kept = at_least <= guarantee.epsilon
    scene.claim(
        f"promised: {guarantee}; observed: {unlike} of {count} ({unlike / count:.2%}), which "
        f"{'does not refute' if kept else 'refutes'} it ({1 - guarantee.delta:.0%} lower bound {at_least:.2%})",
        kept,
    )
    scene.claim(
        "every request was answered, none of Hedgerow's degraded",
        not any(row.traffic.failures for row in rows) and not any(hedgerow.traffic.degraded),
    )
    return edge, hedgerow


def _survive_an_outage(scene: Scene) -> None:
    """The cloud goes away and comes back."""
    images, labels = scene.digits.held_out.images, scene.digits.held_out.labels
    scene.stack.stop("serve")
    with scene.client() as client, console.progress("  without the cloud", unit="requests") as advance:
        traffic = stream(client, MODEL, images, Privacy.NO_LEARNING, advance)
    say(
        f"  without the cloud: {traffic.accuracy(labels):.1%} right, p95 {traffic.latency_ms(0.95):.1f} ms, "
        f"{sum(traffic.degraded) / len(traffic):.1%} marked degraded"
    )
    scene.claim(
        f"all {len(traffic)} requests were answered, on the device",
        not traffic.failures and traffic.share(Tier.EDGE) == 1.0,
    )
    scene.claim("what the gate was unsure of is marked degraded", any(traffic.degraded) and not all(traffic.degraded))

    with console.working("starting the cloud again"):
        scene.stack.start("serve")
    unsure = images[traffic.degraded.index(True)]
    began, again = time.monotonic(), Traffic()
    with scene.client() as client:
        while time.monotonic() - began < RECOVERY_TIMEOUT_S:
            again.ask(client, MODEL, unsure, Privacy.NO_LEARNING)
            if again.tiers[-1] == Tier.CLOUD:
                break
            time.sleep(LOOK_S)  # polls, as any client would have to
    scene.claim(
        f"the cloud is back, and the breaker closed by itself {time.monotonic() - began:.1f} s after",
        again.tiers[-1] == Tier.CLOUD and not again.failures,
    )


def _learn(scene: Scene, base: Outcome) -> Outcome:
    """Let the device work on the field's images, wait for the samples, and train the next student with them."""
    images = scene.digits.field.images
    with scene.client() as client, console.progress("  the device at work", unit="requests") as advance:
        work = stream(client, MODEL, images, Privacy.DEFAULT, advance)
    escalated, began = work.tiers.count(Tier.CLOUD), time.monotonic()
    while len(samples := list(scene.fleet.samples(MODEL))) < escalated and time.monotonic() - began < SAMPLES_TIMEOUT_S:
        time.sleep(LOOK_S)  # polls: the fleet tells nobody about samples
    scene.claim(
        f"{len(images)} images of everyday traffic: {escalated} escalated, {len(samples)} samples reached the fleet",
        len(samples) == escalated and not work.failures,
    )
    counter = base.manifest.counter + 1
    with console.working("training"):
        outcome = next_release(
            scene.stack.home / "learn" / str(counter),
            base=base.folder,
            teacher=base.teacher,
            samples=samples,
            counter=counter,
            seed=scene.seed,
            epsilon=EPSILON,
            delta=DELTA,
            report=say_indented,
        )
    # They were streamed too, marked "no-learning": the device's privacy rule is what keeps them out.
    scene.claim("no held-out image is among the samples", not outcome.dropped.get("reserved"))
    return outcome


def _say_what_changed(scene: Scene, before: tuple[Row, Row], after: tuple[Row, Row]) -> None:
    labels = scene.digits.held_out.labels
    (alone_before, hedgerow_before), (alone_after, hedgerow_after) = before, after
    say(
        f"  what changed: the small model alone {alone_before.traffic.accuracy(labels):.1%} → "
        f"{alone_after.traffic.accuracy(labels):.1%} right, on the device "
        f"{hedgerow_before.traffic.share(Tier.EDGE):.1%} → {hedgerow_after.traffic.share(Tier.EDGE):.1%}, to the cloud "
        f"{console.size(hedgerow_before.cloud_bytes)} → {console.size(hedgerow_after.cloud_bytes)}"
    )


def _step(number: int, text: str) -> None:
    say(f"\n{number}. {text}")


def _say_where_next(home: Path, *, keep: bool) -> None:
    if keep:
        say(f"Everything is still running, from {home}:")
        say("  .venv/bin/hedgerow devices                             what the device runs")
        say("  .venv/bin/hedgerow releases                            what is published, with each guarantee")
        say("  .venv/bin/hedgerow infer digits picture.png --invert   ask it about your dark digit on white")
        say("  .venv/bin/hedgerow down                                stop everything")
    else:
        say("Where to go next: scripts/quickstart --keep leaves everything running for `hedgerow devices`, `releases`")
        say(
            "and `infer`; README.md says how to bring two ONNX files of your own; runtime/ARCHITECTURE.md how it works."
        )
