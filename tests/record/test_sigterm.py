"""SIGTERM flushes every log and then does what it did before: each claim in a process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import weightdyn as wd

SETUP = """
import os, signal, sys, threading, time
import filelock, torch, weightdyn as wd

def logged(out, **options):
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([("p", p)])
    logger = wd.ForceLogger(optimizer, out=out, **options)
    def update():
        p.grad = torch.ones(3, 2)
        optimizer.step()
    return logger, update

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # the handler runs at the next instruction

logger, update = logged(None)
update()  # what is imported at the first use is imported here
logger.close()
print("ready", flush=True)
for line in sys.stdin:
    code, out = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT), number)
        exec(compile(open(code).read(), code, "exec"))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """Imports once, then forks a process for each code."""
    process = subprocess.Popen(
        [sys.executable, "-c", SETUP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(wd.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.fixture
def run(server):
    """Call with code and the folder `out`: exit status, what was printed, and what went to stderr."""

    def run_code(code, out):
        Path(f"{out}.py").write_text(textwrap.dedent(code))
        print(f"{out}.py\t{out}", file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return status, *(Path(f"{out}.{name}").read_text() for name in ("stdout", "stderr"))

    return run_code


def steps(path):
    return wd.RunLog(path).forces()["step"].tolist()


def test_sigterm_flushes_all_loggers_and_ends_the_process_by_the_signal(run, tmp_path):
    status, _, errors = run(
        """
        a, one = logged(out + "/a")
        b, two = logged(out + "/b")
        one(); one(); two()
        terminate()
        print("still here")
        """,
        tmp_path,
    )
    assert status == -signal.SIGTERM, errors
    assert steps(tmp_path / "a") == [1, 2]
    assert steps(tmp_path / "b") == [1]


def test_a_handler_of_the_users_is_called_behind_the_flush_and_may_let_the_process_live(run, tmp_path):
    status, printed, errors = run(
        """
        def mine(number, frame):
            print(number, len(wd.RunLog(out).forces()))
        signal.signal(signal.SIGTERM, mine)
        logger, update = logged(out)
        update()
        terminate()
        update()
        logger.close()
        print(signal.getsignal(signal.SIGTERM) is mine)
        """,
        tmp_path,
    )
    assert status == 0, errors
    assert printed.split() == [str(int(signal.SIGTERM)), "1", "True"]
    assert steps(tmp_path) == [1, 2]


def test_a_handler_that_is_set_later_takes_the_place_of_ours_and_stays(run, tmp_path):
    status, _, errors = run(
        """
        logger, update = logged(out)
        def mine(number, frame):
            raise SystemExit(7)
        signal.signal(signal.SIGTERM, mine)
        update()
        again, more = logged(None)
        again, more = None, None
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        terminate()
        """,
        tmp_path,
    )
    assert status == 7, errors
    assert steps(tmp_path) == [1]


def test_a_later_handler_that_calls_the_one_before_it_ends_as_without_a_logger(run, tmp_path):
    status, printed, errors = run(
        """
        logger, update = logged(out)
        before = signal.getsignal(signal.SIGTERM)
        def mine(number, frame):
            print("mine", flush=True)
            before(number, frame)
        signal.signal(signal.SIGTERM, mine)
        other, more = logged(out + "/other")  # its handler calls mine, which calls the first
        update(); more()
        terminate()
        """,
        tmp_path,
    )
    assert (status, printed) == (-signal.SIGTERM, "mine\n"), errors
    assert steps(tmp_path) == [1]
    assert steps(tmp_path / "other") == [1]


@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
def test_with_the_last_logger_goes_the_handler_and_an_ignored_signal_stays_ignored(run, tmp_path, before):
    status, printed, errors = run(
        f"""
        signal.signal(signal.SIGTERM, signal.{before})
        a, one = logged(None)
        b, two = logged(None)
        one(); two()
        during = signal.getsignal(signal.SIGTERM)
        a.close()
        print(during is not signal.{before}, signal.getsignal(signal.SIGTERM) is during)
        b.close()
        print(signal.getsignal(signal.SIGTERM) == signal.{before})
        """,
        tmp_path,
    )
    ours = before == "SIG_DFL"
    assert (status, printed) == (0, f"{ours} True\nTrue\n"), errors


def test_a_forked_child_dies_by_the_signal_and_writes_nothing(run, tmp_path):
    status, printed, errors = run(
        """
        logger, update = logged(out)
        update()
        child = os.fork()
        if child == 0:
            terminate()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(os.WIFSIGNALED(status), os.WTERMSIG(status), len(wd.RunLog(out).forces()))
        logger.close()
        """,
        tmp_path,
    )
    assert (status, printed) == (0, f"True {int(signal.SIGTERM)} 0\n"), errors
    assert steps(tmp_path) == [1]


def test_a_logger_of_another_thread_is_flushed_if_one_was_made_in_the_main_thread(run, tmp_path):
    status, _, errors = run(
        """
        first, one = logged(out + "/main")
        one()
        def work():
            work.logger, update = logged(out + "/thread")
            update(); update()
        thread = threading.Thread(target=work)
        thread.start(); thread.join()
        terminate()
        """,
        tmp_path,
    )
    assert status == -signal.SIGTERM, errors
    assert steps(tmp_path / "thread") == [1, 2]


def test_a_signal_during_a_flush_of_another_thread_waits_for_it_and_wakes_the_main_thread(run, tmp_path):
    status, _, errors = run(
        """
        logger, update = logged(out)
        update(); update()
        whole = os.replace
        def slow(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)  # handled in the main thread, which is asleep
            time.sleep(0.2)
            whole(*arguments)
        os.replace = slow
        thread = threading.Thread(target=logger.flush)
        thread.start()
        threading.Event().wait(100)
        """,
        tmp_path,
    )
    assert status == -signal.SIGTERM, errors
    assert steps(tmp_path) == [1, 2]
    assert len(list(tmp_path.rglob("forces/*.parquet"))) == 1


@pytest.mark.parametrize("moment", ["write_bytes", "fsync", "replace", "append"])
def test_a_signal_inside_a_flush_lets_it_finish_and_stores_every_row_once(run, tmp_path, moment):
    status, _, errors = run(
        f"""
        import pathlib
        from weightdyn.record import runlog
        place = {{"write_bytes": pathlib.Path, "fsync": os, "replace": os, "append": runlog.RunWriter}}["{moment}"]
        whole = getattr(place, "{moment}")
        def interrupted(*arguments):
            setattr(place, "{moment}", whole)
            terminate()
            result = whole(*arguments)
            print("went on", flush=True)
            return result
        logger, update = logged(out)
        update()
        logger.flush()
        update(); update()
        logger.record(loss=0.5)
        setattr(place, "{moment}", interrupted)
        logger.flush()
        print("survived")
        """,
        tmp_path,
    )
    assert status == -signal.SIGTERM, errors
    assert steps(tmp_path) == [1, 2, 3]
    assert wd.RunLog(tmp_path).metrics()["step"].tolist() == [3]
    assert not list(tmp_path.rglob(".*.tmp"))
    assert len(list(tmp_path.rglob("forces/*.parquet"))) == 2


def test_a_flush_that_fails_is_told_and_the_process_ends_all_the_same(run, tmp_path):
    status, _, errors = run(
        """
        logger, update = logged(out + "/a")
        other, more = logged(out + "/b")
        update(); more()
        def fail():
            raise RuntimeError("broken")
        logger._writer.flush = fail
        terminate()
        """,
        tmp_path,
    )
    assert status == -signal.SIGTERM
    assert "broken" in errors
    assert steps(tmp_path / "b") == [1]
