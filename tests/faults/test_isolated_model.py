"""A model that crashes, hangs, eats memory or is shot takes nobody with it. Real processes, really killed."""

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from simulators import puppet_engine

from hedgerow.errors import EngineFault, HedgerowError, InvalidInput, ModelNotReady
from hedgerow.isolation.session import IsolatedSession, IsolationSettings, open_isolated
from hedgerow.restarts import RestartSettings

MIB = 1024 * 1024
PATIENCE_S = 90.0
QUICK = RestartSettings(backoff_s=0.001, max_backoff_s=0.01, max_restarts=1000)

Open = Callable[..., IsolatedSession]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    """Opens a puppet; restarts are quick and not limited unless a test says so."""
    file, opened = tmp_path / "puppet", []
    file.write_text("open")

    def start(streams: int = 1, **settings: Any) -> IsolatedSession:
        settings = {"restarts": QUICK, "run_timeout_s": 60.0, **settings}
        session = open_isolated(
            "puppet",
            file,
            streams=streams,
            threads=1,
            settings=IsolationSettings(**settings),
            command=puppet_engine.COMMAND,
        )
        opened.append(session)
        return session

    yield start
    for session in opened:
        session.close()


def until(condition: Callable[[], object], what: str) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, f"waited in vain until {what}"
        time.sleep(0.01)


def run(session: IsolatedSession, do: str = "open", x: NDArray[Any] | None = None) -> NDArray[Any]:
    inputs = {"do": np.array([do.encode()], object), "x": np.array([7]) if x is None else x}
    return session.run(inputs, ["y"])["y"]


def again(session: IsolatedSession, do: str = "open") -> NDArray[Any]:
    """As `run`, after the restart that is under way."""
    answers: list[NDArray[Any]] = []

    def answered() -> bool:
        try:
            answers.append(run(session, do))
        except ModelNotReady:
            return False
        return True

    until(answered, "the process ran again")
    return answers[0]


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def in_the_middle(session: IsolatedSession, tmp_path: Path, pool: ThreadPoolExecutor) -> "Future[NDArray[Any]]":
    """A run that is known to have got to the model, and stays there."""
    mark = tmp_path / "hangs"
    running = pool.submit(run, session, f"hang {mark}")
    until(mark.exists, "the model ran")
    mark.unlink()
    return running


@pytest.mark.parametrize(
    ("do", "how"), [("crash", "killed by SIGSEGV"), ("exit 3", "ended with exit code 3"), ("garbage", "nonsense")]
)
def test_a_model_that_ruins_its_process_fails_that_run_and_answers_again(start: Open, do: str, how: str) -> None:
    session = start()
    before = run(session, "pid")[0]
    with pytest.raises(EngineFault, match=how):
        run(session, do)
    assert again(session, "pid")[0] != before
    until(lambda: gone(before), "the old process was gone")


def test_killed_in_the_middle_of_a_run_that_run_fails_at_once_and_the_next_is_answered(
    start: Open, tmp_path: Path
) -> None:
    session = start()
    pid = run(session, "pid")[0]
    with ThreadPoolExecutor() as pool:
        running = in_the_middle(session, tmp_path, pool)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineFault, match="killed by SIGKILL"):
            running.result(PATIENCE_S)
    assert again(session)[0] == 7


def test_killed_while_idle_no_run_pays_for_it(start: Open) -> None:
    session = start()
    pid = run(session, "pid")[0]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the end was noticed")
    assert again(session)[0] == 7


@pytest.mark.parametrize("stopped", [False, True], ids=["hangs", "SIGSTOP"])
def test_a_process_that_does_not_answer_is_killed_when_its_time_is_up(
    start: Open, tmp_path: Path, stopped: bool
) -> None:
    session = start(run_timeout_s=3.0)
    pid = again(session, "pid")[0]
    with ThreadPoolExecutor() as pool:
        if stopped:
            os.kill(pid, signal.SIGSTOP)
            running = pool.submit(run, session)
        else:
            running = in_the_middle(session, tmp_path, pool)
        with pytest.raises(EngineFault, match="did not answer within 3 s"):
            running.result(PATIENCE_S)
    until(lambda: gone(pid), "the hanging process was gone")
    assert again(session)[0] == 7


def test_of_two_runs_in_one_process_both_end_when_it_crashes_and_both_streams_are_there_again(
    start: Open, tmp_path: Path
) -> None:
    session = start(streams=2)
    pid = run(session, "pid")[0]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, session, "meet")
        second = pool.submit(run, session, "meet")
        assert (first.result(PATIENCE_S)[0], second.result(PATIENCE_S)[0]) == (7, 7)  # they were there together
        first = pool.submit(run, session, "meet")
        hanging = in_the_middle(session, tmp_path, pool)
        os.kill(pid, signal.SIGKILL)
        for running in (first, hanging):
            with pytest.raises(EngineFault, match="killed by SIGKILL"):
                running.result(PATIENCE_S)
        again(session)
        assert {f.result(PATIENCE_S)[0] for f in [pool.submit(run, session, "meet") for _ in range(2)]} == {7}


def test_one_model_that_crashes_does_not_disturb_another(start: Open) -> None:
    bad, good = start(), start()
    pid = run(good, "pid")[0]
    for _ in range(3):
        with pytest.raises(EngineFault):
            again(bad, "crash")
        assert run(good, "pid")[0] == pid


def test_a_leak_is_cut_off_after_the_run_where_it_shows_which_is_still_answered(
    start: Open, caplog: pytest.LogCaptureFixture
) -> None:
    session = start(max_memory_bytes=300 * MIB)
    pid = run(session, "pid")[0]

    def cut_off() -> bool:
        try:
            assert again(session, f"eat {20 * MIB}")[0] == 7
        except EngineFault as error:  # on a machine so slow that it was looked at in the middle of this run
            assert "bytes of memory" in str(error)  # noqa: PT017
        return gone(pid)

    until(cut_off, "the leak was cut off")  # it is looked at now and then, not at each run
    assert again(session, "pid")[0] != pid
    assert len([record for record in caplog.records if "bytes of memory" in record.message]) == 1


def test_a_run_that_eats_memory_without_end_is_stopped_in_its_middle(start: Open) -> None:
    session = start(max_memory_bytes=200 * MIB)
    with pytest.raises(EngineFault, match="bytes of memory"):
        run(session, f"eat-on {4 * MIB}")
    assert again(session)[0] == 7


def test_a_process_that_was_started_again_has_run_before_it_takes_runs(start: Open) -> None:
    session = start(streams=2)
    run(session, "open", np.zeros(5, np.int64))
    with pytest.raises(EngineFault):
        run(session, "crash", np.zeros(9, np.int64))
    assert list(again(session, "seen")) == [5, 1], "in the shape that was answered, and before the one that asks"


@pytest.mark.parametrize("size", puppet_engine.WITHOUT_WORD)
def test_a_warming_that_fails_or_ruins_its_process_keeps_nobody_from_being_answered(start: Open, size: int) -> None:
    session = start()
    run(session, "open", np.zeros(size, np.int64))
    with pytest.raises(EngineFault):
        run(session, "crash")
    warmed = [size] if puppet_engine.WITHOUT_WORD[size] == "raise" else []
    assert list(again(session, "seen")) == [*warmed, 1]


def test_one_that_keeps_crashing_is_left_alone_for_a_while_and_then_tried_again(
    start: Open, caplog: pytest.LogCaptureFixture
) -> None:
    restarts = RestartSettings(backoff_s=0.001, max_restarts=2, window_s=600.0, cool_down_s=4.0)
    session = start(restarts=restarts)
    for _ in range(3):
        with pytest.raises(EngineFault, match="SIGSEGV"):
            again(session, "crash")
    with pytest.raises(EngineFault, match="keeps failing: its process was killed by SIGSEGV") as caught:
        run(session)
    assert caught.value.retry_after_s is not None
    assert len([record for record in caplog.records if "left alone" in record.message]) == 1

    def recovered() -> bool:
        try:
            return bool(run(session)[0] == 7)
        except HedgerowError as error:
            assert "keeps failing" in str(error)  # noqa: PT017 (until it has recovered)
            return False

    until(recovered, "the cool-down was over")


def test_errors_of_the_engine_arrive_as_they_are_and_cost_no_process(start: Open) -> None:
    session = start()
    pid = run(session, "pid")[0]
    with pytest.raises(InvalidInput, match="not like this"):
        run(session, "refuse")
    with pytest.raises(EngineFault, match="RuntimeError") as caught:
        run(session, "raise")
    assert "secret" not in str(caught.value)
    assert "secret" in str(caught.value.__cause__)
    with pytest.raises(EngineFault):
        run(session, "wrong-type")
    assert run(session, "pid")[0] == pid


def test_tensors_beyond_the_limit_are_refused_by_whichever_side_has_them(start: Open) -> None:
    session = start(max_tensor_bytes=MIB)
    pid = run(session, "pid")[0]
    with pytest.raises(InvalidInput, match=f"{MIB} are allowed"):
        run(session, "open", np.zeros(MIB, np.int64))
    with pytest.raises(EngineFault, match=f"{MIB} are allowed"):
        run(session, f"grow {MIB}")
    assert run(session, "grow 100000").size == 100_000
    assert run(session, "pid")[0] == pid


def test_what_the_process_says_is_in_our_log_under_the_models_name_and_bounded(
    start: Open, caplog: pytest.LogCaptureFixture
) -> None:
    session = start()
    with caplog.at_level(logging.WARNING, "hedgerow.isolation.process"):
        run(session, "say it is me")
        until(lambda: "puppet: its process says: it is me" in caplog.messages, "the line was logged")
        run(session, "babble " + "x" * 3000)
        until(lambda: "puppet: its process says more than 100 lines in 60 s" in caplog.messages, "it was cut off")
        assert run(session)[0] == 7
    assert len([message for message in caplog.messages if "its process says:" in message]) == 100
    assert max(map(len, caplog.messages)) < 1100


def test_no_descriptor_of_ours_gets_into_the_process(start: Open) -> None:
    ours = [os.dup(0) for _ in range(20)]
    try:
        for descriptor in ours:
            os.set_inheritable(descriptor, True)
        assert run(start(), "descriptors")[0] < len(ours)
    finally:
        for descriptor in ours:
            os.close(descriptor)


def test_a_process_that_dies_while_opening_is_a_fault_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "puppet"
    file.write_text("crash")
    with pytest.raises(EngineFault, match="puppet cannot be loaded: its process was killed by SIGSEGV"):
        open_isolated("puppet", file, streams=1, threads=1, command=puppet_engine.COMMAND)


def test_a_process_that_hangs_while_opening_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "puppet"
    file.write_text(f"hang {tmp_path / 'mark'}")
    settings = IsolationSettings(start_timeout_s=2.0)
    with pytest.raises(EngineFault, match="did not open within 2 s"):
        open_isolated("puppet", file, streams=1, threads=1, settings=settings, command=puppet_engine.COMMAND)


def test_closed_in_the_middle_of_a_run_it_ends_and_refuses(start: Open, tmp_path: Path) -> None:
    session = start()
    pid = run(session, "pid")[0]
    with ThreadPoolExecutor() as pool:
        running = in_the_middle(session, tmp_path, pool)
        session.close()
        session.close()
        with pytest.raises(EngineFault, match="closed"):
            running.result(PATIENCE_S)
    with pytest.raises(ModelNotReady):
        run(session)
    until(lambda: gone(pid), "the process was gone")


class BrokenOff(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def test_a_run_that_its_caller_breaks_off_leaves_no_answer_behind_for_the_next(start: Open, tmp_path: Path) -> None:
    def break_off(*_: object) -> None:
        raise BrokenOff

    def signal_when_it_runs() -> None:
        until(mark.exists, "the model ran")
        os.kill(os.getpid(), signal.SIGUSR1)

    session, mark = start(), tmp_path / "mark"
    pid = run(session, "pid")[0]
    before = signal.signal(signal.SIGUSR1, break_off)
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(signal_when_it_runs)
            with pytest.raises(BrokenOff):
                run(session, f"hang {mark}")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert again(session, "pid")[0] != pid


OWNER = """
import sys, threading
from pathlib import Path
import numpy as np
from hedgerow.isolation.session import open_isolated
from simulators import puppet_engine

session = open_isolated("puppet", Path(sys.argv[1]), streams=2, threads=1, command=puppet_engine.COMMAND)
run = lambda do: session.run({"do": np.array([do.encode()], object), "x": np.array([7])}, ["y"])["y"]
print(run("pid")[0], flush=True)
if len(sys.argv) > 2:
    threading.Thread(target=run, args=(f"hang {sys.argv[2]}",), daemon=True).start()
for line in sys.stdin:
    print(run("pid")[0], flush=True)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process of its own (session and all) that owns a puppet and tells its pid."""
    file, started = tmp_path / "puppet", []
    file.write_text("open")

    def owner(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNER, str(file), *arguments]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(puppet_engine.__file__).parents[1],
            start_new_session=True,
        )
        started.append(process)
        return process

    yield owner
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("hangs", [False, True], ids=["idle", "hanging"])
def test_no_process_outlives_a_killed_owner(
    owner: Callable[..., subprocess.Popen[str]], tmp_path: Path, hangs: bool
) -> None:
    mark = tmp_path / "mark"
    process = owner(*([str(mark)] if hangs else []))
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    if hangs:
        until(mark.exists, "the model hung")
    assert not gone(pid)
    process.kill()
    until(lambda: gone(pid), "the model's process was gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_the_model_to_its_owner(
    owner: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = owner()
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(pid, number)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert int(process.stdout.readline()) == pid


@pytest.mark.timeout(900)
def test_nothing_piles_up_over_a_thousand_runs_and_fifty_restarts(start: Open) -> None:
    session = start(streams=2)

    def held() -> tuple[int, int]:
        gc.collect()  # an error and its traceback may hold each other
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def crash() -> None:
        with pytest.raises(EngineFault):
            again(session, "crash")

    sizes = (1, 1000, 100_000)
    for size in sizes:
        run(session, "open", np.zeros(size, np.int64))
    crash()
    again(session)
    before, memory = held(), resident()
    for index in range(1000):
        size = sizes[index % len(sizes)]
        assert run(session, "open", np.full(size, index)).sum() == size * index
    for _ in range(50):
        crash()
    again(session)
    until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), "all was given back")
    assert resident() - memory < 20 * MIB
