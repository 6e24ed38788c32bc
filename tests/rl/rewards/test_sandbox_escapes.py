"""What programs try to get out of the sandbox, and that they do not: each attempt in each way of keeping them in."""

import contextlib
import os
import platform
import socket
import time

import pytest

from qwq_jax.rl.rewards.sandbox import Lost, Sandbox
from qwq_jax.rl.rewards.seccomp import _CALLS, call_filter
from tests.rl.rewards.enclosures import AROUND, CONFIG, HURRIED, each_style, outcomes, possible, run, unfiltered
from tests.rl.rewards.replies import all_end, own_descendants


@pytest.fixture(scope="module", params=each_style())
def enclosure(request):
    return possible(request.param)


@pytest.mark.parametrize("layer", ["filter", "namespace"])
def test_network(enclosure, layer):
    """The filter refuses sockets; behind it there is no interface to reach anybody by, this machine included."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0qwq-jax-test")
        local.listen()
        port = server.getsockname()[1]
        chosen = enclosure if layer == "filter" else unfiltered(enclosure)
        found = outcomes(
            chosen,
            f"socket.create_connection(('127.0.0.1', {port}), 0.3)",
            "socket.create_connection(('1.1.1.1', 53), 0.3)",
            "socket.create_connection(('169.254.169.254', 80), 0.3)",
            "socket.socket(socket.AF_UNIX).connect('\\0qwq-jax-test')",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
            "socket.if_nameindex()",
        )
    if layer == "filter":
        assert all(line.startswith("PermissionError") for line in found)
        assert outcomes(enclosure, "socket.socket(40, socket.SOCK_STREAM)")[0].startswith("PermissionError")  # vsock
    else:
        assert "refused" in found[0]
        assert all("unreachable" in line for line in (found[1], found[2], found[4]))
        assert "refused" in found[3]
        assert found[5] == "[(1, 'lo')]"


def test_writing_outside(enclosure, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    places = ["/", "/usr", "/lib", "/python", "/python/lib", "/harness", "/dev", "/packages", "/tmp", "/etc", "/root"]
    places += [str(tmp_path), os.getcwd()]
    found = outcomes(
        enclosure,
        *(f"open({place + '/written'!r}, 'w')" for place in places),
        *(f"os.mkdir({place + '/made'!r})" for place in places),
        f"open({str(victim)!r}, 'a').write('torn')",
        f"(os.symlink({str(victim)!r}, '/work/link'), open('/work/link', 'r+'))",
        "(os.symlink('/python/lib', '/work/lib'), open('/work/lib/written', 'w'))",
        f"(os.symlink('../../../../..{victim}', '/work/up'), open('/work/up', 'r+'))",
        "os.link('/harness/qwq_jax', '/work/hard')",
        "os.mknod('/work/disk', 0o060666, os.makedev(254, 0))",
        "os.chmod('/python', 0o777)",
        "os.chown('/work', 0, 0)",
        "os.chdir('..') or open('written', 'w')",
    )
    assert all(
        line.split()[0] in ("OSError", "FileNotFoundError", "PermissionError", "NotADirectoryError") for line in found
    ), found
    assert victim.read_text() == "whole" and sorted(tmp_path.iterdir()) == [victim]


def test_reading_secrets(enclosure, tmp_path, monkeypatch):
    secret = "SECRET-60c1"
    monkeypatch.setenv("QWQ_TEST_SECRET", secret)
    file = tmp_path / "secret"
    file.write_text(secret)
    tmp_path.chmod(0o755)
    file.chmod(0o644)
    paths = [str(file), "/etc/passwd", "/etc/shadow", "/root/.bashrc", "/root", "/home", "/proc/self/environ"]
    paths += [
        f"/proc/{os.getpid()}/environ",
        "/proc/1/root/etc/passwd",
        "/proc/self/mem",
        "/sys/class",
        "/run",
        "/var",
        "/boot",
    ]
    paths += ["/tmp", os.getcwd(), "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/tty", "/dev/pts", "/dev/fd/3"]
    found = outcomes(enclosure, "dict(os.environ)", *(f"open({path!r}, 'rb').read(100)" for path in paths))
    assert secret not in found[0] and set(eval(found[0])) <= {"PWD", "LC_CTYPE", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX"}
    assert all(line.startswith("FileNotFoundError") for line in found[1:]), found
    tree = "sorted({name for place in ('/', '/dev', '/work', '/packages') for name in os.listdir(place)})"
    names = set(eval(outcomes(enclosure, tree)[0]))
    assert names <= {"dev", "harness", "lib", "lib64", "null", "packages", "python", "urandom", "usr", "work", "zero"}
    assert outcomes(enclosure, "os.uname().nodename", "os.getcwd()") == ["'sandbox'", "'/work'"]


def test_open_files_are_not_inherited(enclosure, tmp_path):
    with (tmp_path / "open").open("w+") as file:
        os.set_inheritable(file.fileno(), True)
        program = "[number for number in range(3, 1000) if not os.set_inheritable(number, False)]"
        checks = "[n for n in range(3, 1000) if (lambda: ctypes.CDLL(None).fcntl(n, 1))() != -1]"
        assert outcomes(enclosure, checks, program) == ["[]", "OSError [Errno 9] Bad file descriptor"]


def test_a_module_that_is_called_has_its_own_channel_only(enclosure):
    program = "import ctypes\ndef f(): return [n for n in range(1000) if ctypes.CDLL(None).fcntl(n, 1) != -1]"
    with Sandbox(enclosure, CONFIG) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        handle = sandbox.ask({"do": "open"})["names"]["f"]["value"]
        answer = sandbox.ask({"do": "ask", "question": {"call": handle, "args": [], "kwargs": {}}})
    assert answer["value"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.kill(1, signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        pytest.param("os.killpg(0, signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("os.kill({outside}, signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("[os.kill(n, signal.SIGSTOP) for n in range(1, 40) if n != os.getpid()]", marks=pytest.mark.slow),
    ],
)
def test_killing_the_parent(enclosure, attack):
    """It may reach the sandbox it is in, which then is lost, but nothing outside: this process is still here."""
    program = f"import os, signal\ntry: {attack.format(outside=os.getpid())}\nexcept OSError as error: print(error)\n"
    started, before = time.monotonic(), own_descendants()
    with Sandbox(enclosure, HURRIED) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        below = own_descendants(before)
        with contextlib.suppress(Lost):
            sandbox.ask({"do": "run", "stdin": ""})
    assert all_end(below, 2.0)
    assert time.monotonic() - started < HURRIED.test_seconds + 1.0 + AROUND


def test_no_way_to_more_rights(enclosure):
    found = outcomes(
        enclosure,
        "os.setuid(0)",
        "os.setgid(0)",
        "os.setgroups([0])",
        "os.getresuid()[0] == os.getresuid()[2] and os.getuid() != 0",
        "ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)",  # PR_GET_NO_NEW_PRIVS
        # capget: nothing effective, permitted or inheritable.
        "(lambda sets: ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets) or sum(sets))"
        "((ctypes.c_uint32 * 6)())",
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
        "os.nice(-10)",
    )
    # Invalid where a namespace does not even have the number.
    assert all(line.startswith(("PermissionError", "OSError [Errno 22]")) for line in found[:3]), found
    assert found[3:6] == ["True", "1", "0"]
    assert found[6].startswith("ValueError") and found[7].startswith("PermissionError")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of one architecture")
def test_every_filtered_call_is_refused(enclosure):
    numbers = {name: pair[0] for name, pair in _CALLS.items()}
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers!r}.items():
    ctypes.set_errno(0)
    print(name, libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno())
print("clone3", libc.syscall(435, 0, 0), ctypes.get_errno())
print("x32", libc.syscall(0x40000000 + 57), ctypes.get_errno())
"""
    lines = [line.split() for line in run(enclosure, program)["output"].splitlines()]
    assert {name: (value, number) for name, value, number in lines} == {
        **dict.fromkeys(numbers, ("-1", "1")),
        "clone3": ("-1", "38"),
        "x32": ("-1", "1"),
    }


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_of_calls_are_those_of_the_kernel(column):
    header = ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"][column]
    if not os.path.exists(header):
        pytest.skip(f"{header} is not here")
    with open(header, encoding="utf-8") as file:
        words = [line.split() for line in file if line.startswith("#define __NR")]
    known = {word[1].removeprefix("__NR_").removeprefix("__NR3264_"): word[2] for word in words if len(word) > 2}
    ours = {name: pair[column] for name, pair in _CALLS.items()}
    assert ours == {name: int(known[name]) if name in known else None for name in _CALLS}


def test_machines_without_a_filter():
    assert call_filter("riscv64") is None
    assert len(call_filter("x86_64") or b"") % 8 == 0
