"""Ray on this machine: quiet, bounded, reachable from this machine only, and gone without a trace afterwards.

A process that has already joined a Ray cluster of its own (``ray.init(address=...)``) keeps using that one.
"""

import contextlib
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

from hedgerow.config import exported
from hedgerow.errors import HedgerowError, MissingExtra

CPUS: Final = 2
"""What Ray may hand out; a logical count, not a reservation."""
OBJECT_STORE_BYTES: Final = 100 * 2**20
START_ATTEMPTS: Final = 2
MAX_TMPDIR_CHARS: Final = 24
"""A socket's path has at most 103 bytes (macOS; 107 on Linux), and Ray adds about 77 to the folder."""

_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray binds its servers to every interface of the machine unless clusters are ruled out. The switch is named for the
    # systems where that is the default; it is read when ray is first imported.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # How often Ray Train looks whether its workers are done: by default every two seconds, several times a run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

log = logging.getLogger(__name__)

_Handler = Callable[[int, FrameType | None], Any] | int | None


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own for the length of a ``with``; raises `HedgerowError` if it does not start.

    Enter it on a thread that outlives it: Linux ends Ray's processes with the thread that started them.
    """
    with exported(**_ENVIRONMENT):
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("Ray is not installed; pip install 'hedgerow[cloud]' brings it") from error
        if ray.is_initialized():
            yield
            return
        # Ray prints what its processes come to on our stdout, even where their logs are not asked for.
        ray._private.worker._worker_logs_enabled = False  # noqa: SLF001 (there is no public switch)
        with _sigterm_kept() as ours, _folder() as folder:
            _start(folder)
            try:
                if callable(ours):
                    signal.signal(signal.SIGTERM, ours)
                yield
            finally:
                ray.shutdown()


def ray_address() -> str:
    """Where other processes of this machine can join the Ray that runs here."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@contextlib.contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """The Ray of another process of this machine, for the length of a ``with``; see `ray_address`."""
    with exported(**_ENVIRONMENT):
        import ray

        ray._private.worker._worker_logs_enabled = False  # noqa: SLF001 (as above)
        with _sigterm_kept() as ours:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            try:
                if callable(ours):
                    signal.signal(signal.SIGTERM, ours)
                yield
            finally:
                ray.shutdown()


def _start(folder: str) -> None:
    """Start Ray in `folder`; once more if that fails, as it may on a machine that is busy for a moment."""
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # notices about Ray's own defaults
                ray.init(
                    address="local",
                    num_cpus=CPUS,
                    num_gpus=0,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=folder,
                )
        except Exception as error:  # Ray raises plain Exception where its processes take too long
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise HedgerowError(f"Ray does not start on this machine: {error}") from error
            log.warning("Ray did not start, trying once more: %s", error)
        else:
            return


def _folder() -> "tempfile.TemporaryDirectory[str]":
    """Where Ray keeps its logs and sockets. Sockets' paths are short by law: where TMPDIR is long, /tmp has to do."""
    place = tempfile.gettempdir()
    if len(place) > MAX_TMPDIR_CHARS:
        place = "/tmp"  # noqa: S108 (what is made in it is only ours to enter)
    return tempfile.TemporaryDirectory(prefix="hr-", dir=place, ignore_cleanup_errors=True)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[_Handler]:
    """The SIGTERM handler of before, put back at the end: Ray sets one of its own. None where none can be set."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield before
    finally:
        signal.signal(signal.SIGTERM, before)
