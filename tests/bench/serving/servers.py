"""The servers: how each is started on a model, and what is needed for it. A new one is an entry in `SERVERS`."""

import json
import shutil
import socket
import sysconfig
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.serving.environments import Environments
from bench.serving.models import PEERS, Model
from bench.serving.peers.engine import JOB_FILE, Job
from bench.serving.wire import HOST
from simulators.agents import EXECUTABLE, _toml

import hedgerow

RUNTIME = Path(hedgerow.__file__).parent.parent
OTHER_PORTS = 3
"""That some servers want besides the one that is measured: HTTP, metrics."""
MAX_MESSAGE_BYTES = 2**31 - 1
TRITON_MAX_BATCH = 32
GATE_THRESHOLD = 0.0
"""Everything passes: what is measured is the judging. There is no cloud to escalate to."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is started: its working folder, the interpreter of its venv, the model and its job."""

    folder: Path
    python: str
    model: Model
    job: Job


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and the variables that it needs."""

    arguments: list[str]
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Server:
    """`prepare` writes what the server wants into its folder. `upstream`: the server that must run behind it."""

    title: str
    prepare: Callable[[Place], Command]
    venv: str = ""
    wire: str = "grpc"
    upstream: str = ""


def place(server: Server, model: Model, folder: Path, environments: Environments, upstream: str) -> Place:
    """A fresh folder with the job of `server` in it, on ports that are free now."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    port, *others = _free_ports(1 + OTHER_PORTS)
    job = Job(
        model.name,
        str(model.path),
        model.input,
        model.output,
        list(model.request.shape),
        list(model.expected.shape),
        model.threads,
        model.workers,
        port,
        others,
        upstream,
    )
    (folder / JOB_FILE).write_text(json.dumps(asdict(job)))
    return Place(folder, str(environments.python(server.venv)), model, job)


def _script(name: str, *arguments: str, **variables: str) -> Callable[[Place], Command]:
    def prepare(at: Place) -> Command:
        return Command([at.python, str(PEERS / name), *arguments], variables)

    return prepare


def _agent(at: Place) -> Command:
    """The daemon as a device runs it; with an upstream, the policy that sends everything there."""
    job = at.job
    settings: dict[str, Any] = {
        "server": {"host": HOST, "port": job.port},
        "device": {"id": "bench", "state": str(at.folder / "state")},
        "host": {"workers": job.workers, "engine_threads": job.threads},
    }
    if job.upstream:
        settings["cloud"] = {"target": job.upstream}
        settings["routes"] = {job.model: {"policy": "cloud_first", "require_cloud": True}}
    else:
        gate = {"gate": {"output": job.output, "threshold": GATE_THRESHOLD}} if at.model.gated else {}
        settings["models"] = {job.model: {"path": job.path, **gate}}
    config = at.folder / "edge.toml"
    config.write_text(_toml(settings))
    return Command([EXECUTABLE, "--config", str(config)], {})


def _mlserver(at: Place) -> Command:
    job = at.job
    http_port, metrics_port, _ = job.other_ports
    settings = {
        "host": HOST,
        "http_port": http_port,
        "grpc_port": job.port,
        "metrics_port": metrics_port,
        "parallel_workers": 0,
        "grpc_max_message_length": MAX_MESSAGE_BYTES,
        "debug": False,
    }
    (at.folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": job.model, "implementation": "mlserver_runtime.Runtime"}
    (at.folder / "model-settings.json").write_text(json.dumps(model))
    start = str(Path(at.python).with_name("mlserver"))
    return Command([start, "start", str(at.folder)], {"PYTHONPATH": str(PEERS)})


def _bentoml(at: Place) -> Command:
    start = str(Path(at.python).with_name("bentoml"))
    arguments = ["serve", "bentoml_service:Served", "--host", HOST, "--port", str(at.job.port)]
    variables = {
        "PYTHONPATH": str(PEERS),
        "BENTOML_HOME": str(at.folder / "home"),
        "BENTOML_DO_NOT_TRACK": "true",
    }
    return Command([start, *arguments], variables)


def _triton(*, batching: bool) -> Callable[[Place], Command]:
    def prepare(at: Place) -> Command:
        job = at.job
        packages = next(Path(at.python).parent.parent.glob("lib/python*/site-packages"))
        version = packages.parent.name.removeprefix("python")
        wheel = packages / "pytriton" / "tritonserver"
        # The backend takes the stub that lies beside it; the wheel has one for each Python.
        backend = shutil.copytree(wheel / "backends" / "python", at.folder / "backends" / "python")
        shutil.copy2(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
        folder = at.folder / "models" / job.model / "1"
        folder.mkdir(parents=True)
        shutil.copy2(PEERS / "triton_model.py", folder / "model.py")
        shutil.copy2(PEERS / "engine.py", folder)  # its Python looks into no PYTHONPATH
        (folder.parent / "config.pbtxt").write_text(_triton_config(job, batching=batching))
        http_port, metrics_port, _ = job.other_ports
        arguments = {
            "model-repository": at.folder / "models",
            "backend-directory": backend.parent,
            "grpc-address": HOST,
            "grpc-port": job.port,
            "http-address": HOST,
            "http-port": http_port,
            "metrics-address": HOST,
            "metrics-port": metrics_port,
        }
        return Command(
            [str(wheel / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in arguments.items())],
            {
                "LD_LIBRARY_PATH": _libraries(at.python),
                "PATH": f"{Path(at.python).parent}:/usr/bin:/bin",
            },
        )

    return prepare


def _pytriton(at: Place) -> Command:
    variables = {"LD_LIBRARY_PATH": _libraries(at.python), "PATH": f"{Path(at.python).parent}:/usr/bin:/bin"}
    return Command([at.python, str(PEERS / "pytriton_server.py")], variables)


def _libraries(python: str) -> str:
    """Where Triton's stub finds what the wheel brings, and the libpython of this Python before the system's."""
    packages = next(Path(python).parent.parent.glob("lib/python*/site-packages"))
    return f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"


def _triton_config(job: Job, *, batching: bool) -> str:
    """Without batching the batch is a dimension like any other."""
    lines = [f'name: "{job.model}"', 'backend: "python"', f"max_batch_size: {TRITON_MAX_BATCH if batching else 0}"]
    for kind, name, shape in (("input", job.input, job.input_shape), ("output", job.output, job.output_shape)):
        dims = ", ".join(map(str, shape[1:] if batching else [-1, *shape[1:]]))
        lines.append(f'{kind} [{{ name: "{name}", data_type: TYPE_FP32, dims: [ {dims} ] }}]')
    lines.append(f"instance_group [{{ count: {job.workers}, kind: KIND_CPU }}]")
    return "\n".join([*lines, "dynamic_batching { }"] if batching else lines)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all at once, or two could be the same
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]


_KSERVE = (
    f"--grpc_max_send_message_length={MAX_MESSAGE_BYTES}",
    f"--grpc_max_receive_message_length={MAX_MESSAGE_BYTES}",
)

SERVERS: Mapping[str, Server] = {
    "agent": Server("Hedgerow agent (router, gate)", _agent),
    "bare": Server("Hedgerow service (bare)", _script("bare_server.py")),
    "floor": Server("grpc.aio: parse, run, build", _script("aio_server.py", "run")),
    "echo": Server("grpc.aio: echo", _script("aio_server.py", "echo")),
    "kserve": Server("KServe", _script("kserve_server.py", *_KSERVE), "kserve"),
    "mlserver": Server("MLServer", _mlserver, "mlserver"),
    "triton": Server("Triton, Python backend", _triton(batching=False), "triton"),
    "triton-batching": Server("Triton, Python backend, dynamic batching", _triton(batching=True), "triton"),
    "pytriton": Server("PyTriton", _pytriton, "triton"),
    "ray": Server(
        "Ray Serve",
        _script("ray_server.py", PYTHONPATH=f"{PEERS}:{RUNTIME}", RAY_USAGE_STATS_ENABLED="0"),
        "ray",
    ),
    "litserve": Server("LitServe (HTTP)", _script("litserve_server.py"), "litserve", "http"),
    "bentoml": Server("BentoML (HTTP)", _bentoml, "bentoml", "http"),
    "router": Server("Hedgerow router before a remote", _agent, upstream="bare"),
    "passthrough": Server("grpc.aio pass-through before a remote", _script("passthrough.py"), upstream="bare"),
}
"""In the order of a round. The last two are measured by themselves, without what runs behind them."""
