"""The command line: ``hedgerow``.

Results go to standard output, progress and errors to standard error. An error is one line that says what to do, and
exit code 1; a command line that cannot be understood gives 2. What is heavy is imported by the command that needs it.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

try:
    import typer
except ImportError:
    sys.exit("hedgerow: the command line needs typer and rich: pip install 'hedgerow[cli]'")

from hedgerow.config import BrokerSettings, variable
from hedgerow.errors import BackendUnavailable, ConfigError, DeadlineExceeded, HedgerowError, InvalidInput, Unavailable
from hedgerow_cloud.cli.certify import certify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hedgerow.client import Result
    from hedgerow.proto import fleet_pb2, link_pb2
    from hedgerow.tensors import ModelMetadata
    from hedgerow_cloud.fleet.client import FleetClient

ASSIGN_WAIT_S = 600.0
DEFAULTS = {"fleet": "127.0.0.1:8002", "server": "127.0.0.1:8001"}

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A small model on the device, a large one behind it, and a guarantee on the split.",
)
keys_app = typer.Typer(help="Keys that sign releases.")
app.add_typer(keys_app, name="keys")

Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Home = Annotated[
    Path | None, typer.Option(help="Where everything is kept [default: $XDG_STATE_HOME/hedgerow].", show_default=False)
]
Fleet = Annotated[
    str,
    typer.Option(
        "--fleet", metavar="HOST:PORT", help="The fleet service [default: $HEDGEROW_FLEET, or what `hedgerow up` runs]."
    ),
]
Server = Annotated[
    str,
    typer.Option(
        "--server", metavar="HOST:PORT", help="The inference server [default: $HEDGEROW_SERVER, or `hedgerow up`'s]."
    ),
]


@app.command()
def up(
    home: Home = None,
    teacher: Annotated[
        str, typer.Option(metavar="MODEL=FILE.onnx", help="A large model to serve, from now on.", show_default=False)
    ] = "",
    broker: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="An MQTT broker to use instead of ours, from now on.")
    ] = "",
) -> None:
    """Run broker, fleet service, large model and one device on this machine, until Ctrl-C."""
    from hedgerow_cloud.cli import console
    from hedgerow_cloud.local.stack import Stack, default_home

    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: nothing may stay behind
        signal.signal(number, signal.default_int_handler)
    stack = Stack.provision(home or default_home())
    if running := stack.running():
        raise ConfigError(f"{', '.join(running)} of {stack.home} run already; `hedgerow down` stops them")
    if teacher:
        model, _, file = teacher.partition("=")
        if not model or not Path(file).is_file():
            raise InvalidInput(f"--teacher {teacher}: give MODEL=FILE.onnx, a file that is there")
        stack.teach(model, Path(file))
    if broker:
        host, port = _address(broker, "broker")
        stack.meet_at(BrokerSettings(host=host, port=port))
    stack.remember()
    with stack:
        for name in stack.of_use:
            with console.working(f"starting {name}"):
                stack.start(name)
            console.note(f"{name:8} {stack.address(name):22} log: {stack.log(name)}")
        if not stack.settings.teachers:
            console.note(
                "there is no large model here yet: the device is on its own (`hedgerow up --teacher` brings one)"
            )
        console.note("everything is up; Ctrl-C stops it")
        stack.watch()


app.command()(certify)


@app.command()
def down(home: Home = None) -> None:
    """Stop what `up`, or `demo --keep`, left running."""
    from hedgerow_cloud.cli import console
    from hedgerow_cloud.local.stack import Stack

    stack = Stack(home or _home())
    running = stack.running()
    stack.stop()
    console.note(f"stopped: {', '.join(running)}" if running else "nothing was running")


@app.command()
def devices(fleet: Fleet = "", json: Json = False) -> None:
    """List the devices and what each of them runs."""
    from hedgerow_cloud.cli import console

    with _fleet(fleet) as client:
        found = client.devices()
    if json:
        console.say_json(console.rows_of(found))
        return
    console.table(
        ("device", "online", "runs", "assigned", "doing", "profile"),
        [
            (
                device.id,
                "yes" if device.online else f"no, {console.ago(device.last_seen_unix_ms)}",
                "\n".join(f"{model.model}/{model.running}" for model in device.models if model.running) or "-",
                "\n".join(f"{item.model}/{item.counter}" for item in device.assigned) or "-",
                "\n".join(_doing(model) for model in device.models if model.target) or "-",
                device.profile or "-",
            )
            for device in found
        ],
    )
    for device in found:
        for problem in _problems(device):
            print(console.printable(f"{device.id}: {problem}"))


@app.command()
def releases(
    model: Annotated[str, typer.Argument(help="Only of this model.")] = "", fleet: Fleet = "", json: Json = False
) -> None:
    """List the published releases."""
    from hedgerow_cloud.cli import console

    with _fleet(fleet) as client:
        found = client.releases(model)
    if json:
        console.say_json(console.rows_of(found))
        return
    console.table(
        ("release", "size", "published", "assigned", "running", "guarantee"),
        [
            (
                f"{item.model}/{item.counter}",
                console.size(item.bytes),
                console.ago(item.published_unix_ms),
                item.assigned,
                item.running,
                item.guarantee or "-",
            )
            for item in found
        ],
    )


@app.command()
def publish(
    release_dir: Annotated[Path, typer.Argument(help="Folder with a manifest.json.")],
    keys: Annotated[
        Path | None, typer.Option(help="Folder of the offline keys [default: `up`'s].", show_default=False)
    ] = None,
    fleet: Fleet = "",
    json: Json = False,
) -> None:
    """Sign a release with the offline keys and upload it."""
    from hedgerow import release
    from hedgerow_cloud.cli import console
    from hedgerow_cloud.publish import provision

    manifest = release.read(release_dir)
    with _fleet(fleet) as client:
        current = client.metadata("targets.json")
        targets = provision.sign(keys or _home() / "keys", current, (release_dir / release.MANIFEST).read_bytes())
        with console.progress(f"publishing {manifest.name}") as advance:
            published = client.publish(release_dir, targets, advance)
    if json:
        console.say_json(console.plain(published))
    else:
        console.note(f"release {manifest.name} is published: {console.size(published.bytes)}")
        console.note(f"next: hedgerow assign {manifest.model} {manifest.counter}")


@app.command()
def assign(
    model: str,
    counter: Annotated[int, typer.Argument(min=1)],
    device: Annotated[list[str] | None, typer.Argument(help="Devices; none: every one.", show_default=False)] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until each device runs it, or refuses.")] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="Longest wait for a device.")] = ASSIGN_WAIT_S,
    fleet: Fleet = "",
    json: Json = False,
) -> None:
    """Give a release to devices."""
    from hedgerow_cloud.cli import console

    with _fleet(fleet) as client:
        before = {known.id: known.trust for known in client.devices()} if wait else {}
        given = list(client.assign(model, counter, device or []))
        if wait:
            for one in given:
                _wait(client, one, model, counter, timeout_s, before.get(one, ""))
    if json:
        console.say_json({"model": model, "counter": counter, "devices": given})
    else:
        console.note(f"{model}/{counter} {'runs on' if wait else 'is assigned to'} {', '.join(given)}")


@app.command()
def infer(
    model: str,
    file: Annotated[Path, typer.Argument(help="An .npy array or a .png picture.")],
    invert: Annotated[bool, typer.Option("--invert", help="Swap light and dark of the picture.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.001)] = 10.0,
    server: Server = "",
    json: Json = False,
) -> None:
    """Ask a model about a file: the answer, how sure it is, who gave it, and why."""
    from hedgerow.client import Client
    from hedgerow_cloud.cli import console, picture

    if not file.is_file():
        raise InvalidInput(f"there is no file {file}")
    target = _target(server, "server")
    with Client(target, timeout_s=timeout_s) as client:
        try:
            metadata = client.metadata(model)
        except Unavailable as error:
            raise BackendUnavailable(f"the inference server at {target} does not answer") from error
        if len(metadata.inputs) != 1:
            names = ", ".join(spec.name for spec in metadata.inputs)
            raise InvalidInput(f"model {model} takes {len(metadata.inputs)} inputs ({names}); a file fits one")
        array, done = picture.read(file, metadata.inputs[0], invert=invert)
        result = client.infer(model, {metadata.inputs[0].name: array})
    if done:
        console.note(f"{file.name}: {done}")
    facts = _facts(result, metadata)
    if json:
        console.say_json(facts)
    else:
        for name, value in facts.items():
            # A Hedgerow names the release; the version is the answering model's, maybe the cloud's.
            if value not in {None, ""} and not (name == "served" and result.tier):
                print(f"{name:11} {value}")


@app.command()
def top(
    address: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[HOST:PORT]…",
            help="Where devices serve their metrics [default: $HEDGEROW_METRICS, or `hedgerow up`'s device].",
            show_default=False,
        ),
    ] = None,
    interval_s: Annotated[float, typer.Option(min=0.1, max=3600, help="Between two readings.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end, as without a terminal.")] = False,
    json: Json = False,
) -> None:
    """Watch what devices do: models, queues, latency, who answers, and the way to the cloud."""
    from dataclasses import asdict

    from hedgerow_cloud.cli import console
    from hedgerow_cloud.cli import top as watching

    addresses = address or [_metrics()]
    for one in addresses:
        _address(one, "metrics")
    if not (once or json) and sys.stdout.isatty():
        watching.follow(addresses, interval_s)
        return
    devices = watching.once(addresses, interval_s)
    if json:
        console.say_json([asdict(device) for device in devices])
    else:
        watching.show(devices)


@app.command()
def doctor(home: Home = None, fleet: Fleet = "", server: Server = "", json: Json = False) -> None:
    """Say what is installed, what this machine is, what can be reached, and what is missing."""
    from dataclasses import asdict

    from hedgerow_cloud.cli import console
    from hedgerow_cloud.cli.doctor import examine

    checks = list(examine(home or _home(), _target(fleet, "fleet"), _target(server, "server")))
    if json:
        console.say_json([asdict(check) for check in checks])
        return
    console.table(
        ("check", "", "finding", "what to do"),
        [(check.name, "ok" if check.ok else "--", check.detail, check.fix) for check in checks],
    )


@app.command()
def demo(
    home: Annotated[
        Path | None, typer.Option(help="Where to keep everything [default: a temporary folder].", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 2026,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running.")] = False,
) -> None:
    """Tell the whole story on real handwritten digits."""
    from hedgerow_cloud.demo import story

    raise typer.Exit(story.run(home=home, seed=seed, keep=keep))


@keys_app.command("init")
def keys_init(
    keys: Annotated[Path, typer.Option(help="Folder for the offline keys; keep it away from the fleet.")],
    home: Annotated[Path, typer.Option(help="Folder of the fleet service: `home` in its settings.")],
) -> None:
    """Make the keys and roots of a fleet."""
    from hedgerow_cloud.cli import console
    from hedgerow_cloud.publish import provision

    provision.create(keys, home)
    console.note(f"offline keys, and the roots that devices are given: {keys}")
    console.note(f"fleet: {home}")


def main() -> None:
    """Run the command line and exit."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:  # noqa: BLE001 (the end of the line: people get a sentence, never a traceback)
        _fail(*_explain(error))
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """What to say of `error`, and the exit code."""
    if isinstance(error, BackendUnavailable):
        return f"{error}; `hedgerow up` starts everything, --fleet and --server name other addresses", 1
    if isinstance(error, HedgerowError):
        return str(error), 1
    if isinstance(error, ImportError):
        return f"{error.name} is not installed; `hedgerow doctor` says which extra brings it", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}", 1
    usage = getattr(error, "format_message", None)  # of click, which typer brings in one form or another
    if usage is not None:
        return f"{usage()} (--help says more)", 2
    return f"unexpected {type(error).__name__}: {error}; please report it", 1


def _fail(message: str, code: int) -> NoReturn:
    line = "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
    print("hedgerow:", line, file=sys.stderr)
    sys.exit(code)


def _fleet(option: str) -> "FleetClient":
    from hedgerow_cloud.fleet.client import FleetClient

    return FleetClient(_target(option, "fleet"))


def _target(option: str, what: str) -> str:
    """Where to call: the option, the environment, what `up` runs, or the usual port."""
    from hedgerow_cloud.local.stack import STACK, Stack

    named = option or variable(f"HEDGEROW_{what.upper()}")
    if not named and (_home() / STACK).exists():
        stack, daemon = Stack(_home()), "edge" if what == "server" else what
        if daemon in stack.running():
            return stack.address(daemon)
    named = named or DEFAULTS[what]
    _address(named, what)
    return named


def _metrics() -> str:
    """Where the metrics are: the environment, what `up` runs, or the usual port."""
    from hedgerow_cloud.cli.top import DEFAULT

    said = _home() / "edge" / "metrics-address"  # by the device that `up` runs
    return (
        variable("HEDGEROW_METRICS") or (said.read_text(encoding="utf-8").strip() if said.exists() else "") or DEFAULT
    )


def _address(text: str, option: str) -> tuple[str, int]:
    """Host and port in `text`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{text!r} is no address; --{option} takes HOST:PORT")
    return host, int(port)


def _home() -> Path:
    from hedgerow_cloud.local.stack import current_home

    return current_home()


def _doing(model: "link_pb2.ModelStatus") -> str:
    share = f" {model.bytes_done / model.bytes_total:.0%}" if 0 < model.bytes_done < model.bytes_total else ""
    return f"{model.model}/{model.target} {model.phase}{share}"


def _problems(device: "fleet_pb2.Device") -> "Iterator[str]":
    """What keeps a device from running what it is assigned, as it says itself."""
    if device.trust:
        yield f"no updates: {device.trust}"
    for model in device.models:
        if model.reason:
            counter = model.target or model.failed
            yield f"{model.model}/{counter}: {model.reason}" if counter else model.reason


def _wait(client: "FleetClient", device: str, model: str, counter: int, timeout_s: float, distrust: str) -> None:
    """Return when `device` runs the release; raises `HedgerowError` if it refuses it or takes too long.

    `distrust` is why it refused updates before, if it did.
    """
    from hedgerow_cloud.cli import console

    last = None
    with console.progress(f"{device}: {model}/{counter}") as advance:
        try:
            for last in client.watch(device, timeout_s):
                if last.trust not in {"", distrust}:
                    raise HedgerowError(f"{device} does not run {model}/{counter}: {last.trust}")
                for status in last.models:
                    if status.model == model and status.failed == counter:
                        raise HedgerowError(f"{device} does not run {model}/{counter}: {status.reason}")
                    if status.model == model and status.running == counter and status.target != counter:
                        return  # it runs, and has passed its probation
                    if status.model == model and status.target == counter:
                        advance(status.bytes_done, status.bytes_total)
        except DeadlineExceeded as error:
            why = "" if last is None else last.trust or ("" if last.online else "it is offline")
            raise HedgerowError(
                f"{device} does not run {model}/{counter} after {timeout_s:g} s{why and ': ' + why}"
            ) from error
    raise HedgerowError(f"the fleet service went away before {device} ran {model}/{counter}")


def _facts(result: "Result", metadata: "ModelMetadata") -> dict[str, object]:
    """What there is to say of an answer, in the order in which to say it."""
    import numpy as np

    facts: dict[str, object] = {}
    name, values = next(iter(result.outputs.items()))
    if len(result.outputs) == 1 and values.size > 1 and values.dtype.kind == "f" and values.size == values.shape[-1]:
        top = int(values.argmax())
        labels = metadata.properties.get("labels", "").split(",")
        facts["answer"] = labels[top] if top < len(labels) and labels[top] else top
    else:
        for name, values in result.outputs.items():
            facts[name] = np.array2string(values, threshold=16)
    return facts | {
        "confidence": None if result.confidence is None else round(result.confidence, 4),
        "tier": result.tier,
        "reason": result.reason,
        "release": result.release,
        "degraded": result.degraded,
        "served": f"{result.model} {result.model_version}".strip(),
    }


if __name__ == "__main__":
    main()
